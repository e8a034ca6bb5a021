"""Numbers that the compiled step is given: what shares a program, and that they are used."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.core.override import override
from deepseek_jax.optim.muon import Muon
from deepseek_jax.train.step import build_program
from deepseek_jax.train.traced import PARTS, traced_values, with_traced

SHARED = {
  'optimizer.peak_lr': 0.02,
  'optimizer.weight_decay': 0.0,
  'objective.mtp_weight': 0.7,
  'balance.rate': 0.5,
  'seed': 3,
}


def changed(changes):
  return override(tiny_mla.get_config(), changes)[0]


def text(experiment):
  """The step as the compiler is given it."""
  program = build_program(experiment, jax.devices()[:1])
  return program.step.lower(program.abstract_state, program.abstract_batch()).as_text()


@pytest.fixture(scope='module')
def plain():
  return text(tiny_mla.get_config())


@pytest.mark.parametrize('path', SHARED)
def test_one_program_whatever_the_value(plain, path):
  assert text(changed({path: SHARED[path]})) == plain


@pytest.mark.parametrize('path', ['optimizer.beta1', 'schedule.final'])
def test_other_values_are_another_program(plain, path):
  assert text(changed({path: 0.5})) != plain


def test_values_are_those_of_the_config():
  experiment = changed(SHARED)
  values = traced_values(experiment)
  assert values == {
    'seed': 3,
    'optimizer': {'peak_lr': np.float32(0.02), 'weight_decay': 0.0},
    'objective': {'mtp_weight': np.float32(0.7)},
    'balance': {'rate': 0.5},
  }
  fresh = with_traced(tiny_mla.get_config(), values)
  assert fresh.balance.rate == 0.5
  # What it was made of is as it was.
  assert tiny_mla.get_config().balance.rate != 0.5
  assert set(values) <= {'seed', *PARTS}
  without = dataclasses.replace(experiment, balance=None, optimizer=Muon(peak_lr=1e-3))
  assert set(traced_values(without)) == {'seed', 'optimizer', 'objective'}


@pytest.mark.slow
def test_a_step_by_the_values_it_is_given():
  """The compiled step of one config, given another's numbers, does what the other's does."""
  one, other = (
    build_program(experiment, jax.devices()[:1])
    for experiment in (tiny_mla.get_config(), changed(SHARED))
  )
  rng = np.random.default_rng(0)
  batch = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), one.abstract_batch())
  batch = batch.replace(tokens=rng.integers(3, 200, batch.tokens.shape).astype(np.int32))

  def run(program, constants):
    state = one.init(jax.random.key(0))
    with jax.set_mesh(program.mesh):
      for _ in range(2):
        state, metrics = program.step.function(state, batch, *constants)
    return jax.device_get((state.params, state.buffers, metrics['learning_rate']))

  got, want, before = (
    run(one, other.step.constants),
    run(other, other.step.constants),
    run(one, one.step.constants),
  )
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert any(jax.tree.leaves(jax.tree.map(lambda a, b: np.any(a != b), got, before)))
