"""Layouts that are tried, those that are compiled, and what is kept of them."""

import dataclasses

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.load import load_config
from deepseek_jax.models.remat import EveryLayer
from deepseek_jax.pods import search
from deepseek_jax.pods.plan import Memory
from deepseek_jax.pods.topology import parse_topology
from deepseek_jax.pods.training import read_training

SPACE = search.Space(
  expert=(1, 4),
  model=(1, 2, 3),
  microbatches=(1, 3, 8),
  remat=(EveryLayer(),),
  moments=('float32',),
)
SLICE = parse_topology('v6e:4x2')


@pytest.fixture(scope='module')
def ranked(shrink):
  """Every layout of the small run on eight chips, two of its layers with experts."""
  return search.rank(shrink(**{'model.dense_layers': 2}), SLICE, SPACE)


def test_layouts_that_cannot_be_are_left_out(ranked):
  """Three does not divide the devices, nor the rows; 32 rows at once fit no 8 microbatches."""
  meshes = {(c.experiment.mesh.expert, c.experiment.mesh.model) for c in ranked}
  assert meshes == {(1, 1), (1, 2), (4, 1), (4, 2)}
  assert {c.experiment.microbatches for c in ranked} == {1, 8}
  times = [c.rough.step_seconds for c in ranked]
  assert times == sorted(times)
  for candidate in ranked:
    assert not candidate.experiment.check(8)
    assert candidate.experiment.data.batch_size == 64


def test_few_of_one_kind_are_compiled(ranked):
  """One of each mesh and remat."""
  chosen = search.choose(ranked, 3)
  assert len({c.experiment.mesh for c in chosen}) == len(chosen) == 3
  assert chosen[0] is ranked[0]


def test_what_was_compiled_is_kept_and_runs(ranked, training, small_slice, tmp_path):
  """A second search compiles nothing; one that was killed goes on; configs can be loaded."""
  plan = read_training(training.program, small_slice, training.build)
  asked = []

  def compile_plan(candidate):
    asked.append(candidate.name)
    if len(asked) == 2:
      raise KeyboardInterrupt
    return dataclasses.replace(plan, topology=candidate.topology.name)

  chosen = search.choose(ranked, 3)
  quiet = lambda line: None  # noqa: E731
  with pytest.raises(KeyboardInterrupt):
    search.compile_best(chosen, tmp_path, compile_plan, quiet)
  found = search.compile_best(chosen, tmp_path, compile_plan, quiet)
  assert asked == [chosen[0].name, chosen[1].name, chosen[1].name, chosen[2].name]
  again = search.compile_best(chosen, tmp_path, compile_plan, quiet)
  assert len(asked) == 4
  assert [f.plan for f in again] == [f.plan for f in found]
  for candidate in chosen:
    assert load_config(tmp_path / f'{candidate.name}.py') == candidate.experiment
  assert 'GiB to spare' in search.describe_found(found)


def test_the_frontier(ranked, training, small_slice):
  """What another beats in chips, time and memory at once is not on it; nor what does not fit."""
  plan = read_training(training.program, small_slice, training.build)

  def item(seconds, spare):
    time = dataclasses.replace(plan.time, step_seconds=seconds)
    memory = Memory(by_class={}, peak_bytes=100 - spare, usable_bytes=100, largest=())
    return search.Found(ranked[0], dataclasses.replace(plan, time=time, memory=memory))

  fast, roomy, beaten, large = item(1.0, 5), item(2.0, 9), item(2.0, 4), item(0.5, -1)
  assert search.pareto([beaten, roomy, large, fast]) == [fast, roomy]


def test_nothing_fits(shrink):
  """The message says what came nearest and by how much."""
  experiment = shrink(**{'model.vocab': 2**24, 'data.length': 2**16})
  with pytest.raises(ConfigError, match=r'no layout fits; nearest is .* GiB over'):
    search.rank(experiment, parse_topology('v5e:4x2'), SPACE)
