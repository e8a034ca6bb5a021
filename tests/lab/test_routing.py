"""Evenness of experts: what is counted, beside what the model observes and what is drawn."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from deepseek_jax import lab
from deepseek_jax.core.config import ConfigError
from deepseek_jax.lab.routing import LayerRouting, routing, routing_table, unread_batches


def without_bias(model):
  zeros = jax.tree.map(lambda x: 0 * x, model.variables['buffers'])
  return dataclasses.replace(model, variables={**model.variables, 'buffers': zeros})


@pytest.fixture(scope='module')
def found(model, packed):
  return routing(model, [packed, packed])


def test_loads_are_those_of_the_classes(model, packed, found):
  """Counted another way by `expert_load`."""
  other = lab.expert_load(model, packed)
  assert [layer.layer for layer in found] == list(other.layers)
  for layer, counts in zip(found, other.counts, strict=True):
    np.testing.assert_array_equal(layer.loads, [counts.sum(axis=0)] * 2)


def test_only_a_bias_makes_choices_unfree(model, packed, found):
  assert all(layer.free == 1.0 for layer in routing(without_bias(model), [packed]))
  assert all(0.2 < layer.free < 1.0 for layer in found)


def made(loads, noise=(1.0, 1.0)):
  return LayerRouting(layer=3, loads=np.array(loads, np.float64), free=0.5, noise=noise)


def test_figures():
  """Two batches that are uneven by themselves and even together, but for an idle expert."""
  layer = made([[30, 10, 0, 20], [10, 30, 0, 20]])
  assert layer.evenness == 30 / 40
  assert layer.used == 0.75
  assert layer.batch_peak == (2.0, 2.0)
  row = routing_table([layer]).splitlines()[-1]
  assert row == '| 3 | 0.750 | 75% | 2.000 (2.000) | 1.000 (1.000) | 50.0% |'


def test_noise_is_that_of_even_draws(model, packed, found):
  """Beside the largest of as many even draws, made one by one."""
  generator = np.random.default_rng(5)
  for layer in found:
    total, experts = int(layer.loads[0].sum()), layer.loads.shape[1]
    draws = generator.integers(0, experts, (400, total))
    peaks = [np.bincount(draw, minlength=experts).max() * experts / total for draw in draws]
    assert layer.noise[0] == pytest.approx(np.median(peaks), rel=0.05)
    assert layer.noise[1] == pytest.approx(np.quantile(peaks, 0.95), rel=0.08)


def test_unread_text(model, experiment, cache_dir):
  """Held-out rows, then the rows of the first epoch that no step has read."""
  data = experiment.data.prepare(cache_dir)
  size, step = experiment.data.batch_size, 2
  later = dataclasses.replace(model, step=step)
  with pytest.raises(ConfigError, match=r'1000000000 tokens .* there are \d+'):
    list(unread_batches(later, data, 10**9))
  heldout, epoch = -(-data.heldout.rows // size), data.train.rows // size
  assert epoch > step + 1
  seen = list(itertools.islice(data.train_batches(0), epoch))
  taken = list(itertools.islice(unread_batches(later, data, 10**9), heldout + epoch - step))
  for mine, theirs in zip(taken[heldout:], seen[step:], strict=True):
    np.testing.assert_array_equal(mine.tokens, theirs.tokens)
  assert len(list(unread_batches(later, data, 1))) == 1


def test_a_model_without_experts_is_told(make_model, packed):
  with pytest.raises(ConfigError, match='no layer'):
    routing(make_model(depth=1), [packed])
