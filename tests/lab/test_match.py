"""Equal cost: what is counted or timed, the steps that follow, and what cannot be matched."""

import dataclasses
import itertools
import time
import types

import jax
import numpy as np
import pytest

from configs import tiny_window
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.override import override
from deepseek_jax.lab.groups import pair_up
from deepseek_jax.lab.match import (
  ActiveParameters,
  FlopsPerToken,
  Matched,
  WallClock,
  describe_match,
  match_steps,
)
from deepseek_jax.train.step import build_program


def programs(small, **points):
  return {name: build_program(override(small, point)[0]) for name, point in points.items()}


def test_flops_of_whole_runs_are_equal(small, tmp_path):
  found = programs(
    small,
    base={'train_steps': 1000},
    deep={'train_steps': 1000, 'model.depth': 6, 'model.dense_layers': 6},
    rows={'train_steps': 1000, 'data.batch_size': 16},
    long={'train_steps': 1000, 'data.length': 32},
  )
  matched = match_steps(FlopsPerToken(), found, pair_up('base', found), tmp_path)
  total = matched['base'].cost * 1000
  assert matched['base'].steps == 1000
  assert 250 < matched['deep'].steps < 1000
  # Twice the rows cost exactly twice; twice the length a little more, for attention.
  assert matched['rows'].steps == 500
  assert matched['rows'].cost == 2 * matched['base'].cost
  assert 400 < matched['long'].steps < 500
  for row in matched.values():
    assert row.asked_steps == 1000
    assert row.cost * row.steps == pytest.approx(total, rel=2e-3)
  text = describe_match(FlopsPerToken(), matched, pair_up('base', matched))
  assert 'training FLOPs a step' in text
  assert '-50.0%' in text
  assert 'as asked' in text


def test_flops_are_six_a_weight_and_token_and_attention(small, tmp_path):
  """By hand, from the arrays themselves."""
  (program,) = programs(small, base={}).values()
  cost = match_steps(
    FlopsPerToken(), {'base': program}, pair_up('base', {'base': program}), tmp_path
  )['base'].cost
  params = program.abstract_state.params
  leaves = jax.tree_util.tree_leaves_with_path(params)
  # Matrices have two axes beside that of the layers; norms have one, the embedding is looked up.
  met = sum(
    leaf.size
    for path, leaf in leaves
    if leaf.ndim >= 2 and 'embedding' not in str(path) and 'norm' not in str(path)
  )
  attention = small.model.attention
  mixing = 2 * attention.heads * (8 + 4 + 8) * (16 + 1) / 2 * small.model.depth
  assert cost == pytest.approx(3 * (2 * met + mixing) * 16 * 8, rel=0.02)


def test_active_parameters_are_required_and_steps_stay(small, tmp_path):
  # Another look at the same text with the same matrices.
  window = tiny_window.get_config().model.attention
  found = programs(
    small,
    base={},
    window={'model.attention': window, 'train_steps': 30},
    wide={'model.width': 24},
    deep={'model.depth': 3, 'model.dense_layers': 3},
  )
  alike = {name: found[name] for name in ('base', 'window')}
  matched = match_steps(ActiveParameters(), alike, pair_up('base', alike), tmp_path)
  assert [row.steps for row in matched.values()] == [20, 30]
  with pytest.raises(ConfigError) as caught:
    match_steps(ActiveParameters(), found, pair_up('base', found), tmp_path)
  assert [message.split(':')[0] for message in caught.value.messages] == ['wide', 'deep']
  assert 'of the baseline' in caught.value.messages[0]
  match_steps(ActiveParameters(tolerance=0.9), found, pair_up('base', found), tmp_path)
  with pytest.raises(ConfigError, match='tolerance'):
    ActiveParameters(tolerance=1.5)


class Ticking:
  """A run whose steps take a given time, by a clock of its own."""

  def __init__(self, experiment, clock, seconds):
    data = types.SimpleNamespace(train_batches=lambda step: itertools.repeat(np.zeros(1)))
    self.experiment = types.SimpleNamespace(
      train_steps=experiment.train_steps,
      seed=0,
      data=types.SimpleNamespace(prepare=lambda cache_dir: data),
    )
    self.batch_sharding = None
    self._clock, self._seconds = clock, itertools.chain(seconds, itertools.repeat(seconds[-1]))

  def init(self, key):
    return 0

  def step(self, state, batch):
    self._clock['now'] += next(self._seconds)
    return state + 1, {'loss': np.float32(1)}


def test_wall_clock_is_the_median_after_warming_up(small, tmp_path, monkeypatch):
  clock = {'now': 0.0}
  monkeypatch.setattr(time, 'perf_counter', lambda: clock['now'])
  found = {
    'base': Ticking(small, clock, [60.0, 9.0, 1.0, 1.0, 5.0, 1.0, 1.0]),
    'slow': Ticking(small, clock, [90.0, 4.0]),
  }
  matched = match_steps(
    WallClock(timed_steps=5, warmup_steps=2), found, pair_up('base', found), tmp_path
  )
  assert [row.cost for row in matched.values()] == [1.0, 4.0]
  assert [row.steps for row in matched.values()] == [20, 5]
  assert '4.0 s' in describe_match(WallClock(), matched, pair_up('base', matched))
  with pytest.raises(ConfigError, match='`timed_steps` is 0'):
    WallClock(timed_steps=0)


def test_what_no_steps_can_pay_is_refused(small):
  reference = Matched(cost=1.0, asked_steps=20, steps=20)
  assert FlopsPerToken().steps(small, 20.0, reference) == 1
  with pytest.raises(ConfigError, match='41 times one of the baseline'):
    FlopsPerToken().steps(small, 41.0, reference)


def test_steps_are_set_by_one_of_the_two(small, tmp_path):
  found = programs(small, base={}, short={'train_steps': 10})
  with pytest.raises(ConfigError, match='ask for 10, 20 train_steps'):
    match_steps(FlopsPerToken(), found, pair_up('base', found), tmp_path)


def test_kinds_are_frozen_and_comparable():
  assert FlopsPerToken() == FlopsPerToken()
  assert hash(WallClock()) == hash(WallClock())
  with pytest.raises(dataclasses.FrozenInstanceError):
    ActiveParameters().tolerance = 0.5


def test_groups_are_matched_each_to_its_own(small, tmp_path):
  wide = {'model.width': 24}
  found = programs(small, **{
    'short,plain': {},
    'short,wide': wide,
    'long,plain': {'train_steps': 40},
    'long,wide': {'train_steps': 40, **wide},
  })  # fmt: skip
  pairs = pair_up('plain', found)
  matched = match_steps(FlopsPerToken(), found, pairs, tmp_path)
  steps = {name: row.steps for name, row in matched.items()}
  assert (steps['short,plain'], steps['long,plain']) == (20, 40)
  assert steps['short,wide'] < 20
  assert steps['long,wide'] == pytest.approx(2 * steps['short,wide'], abs=1)
  assert 'against short,plain or long,plain' in describe_match(FlopsPerToken(), matched, pairs)
