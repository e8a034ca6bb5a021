"""A step with rounded activations on eight devices is that of one, and near the exact one."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.core.tree import flatten
from deepseek_jax.data.batch import Batch
from deepseek_jax.models.remat import Compressed, EveryLayer
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import FSDP, TENSOR
from deepseek_jax.train.step import build_program

ROWS, LENGTH = 8, 32
LAYOUTS = {
  'single': (FSDP, MeshConfig(data=1)),
  'fsdp': (FSDP, MeshConfig(data=8)),
  'tensor': (TENSOR, MeshConfig(data=2, model=4)),
}
SAME = 2e-3
"""Relative to the norm: a sum in another order may push an element over the edge of a step."""


@functools.cache
def one_step(remat, layout, microbatches=1):
  """Returns the mean gradient of Adam after a step from random weights, and the metrics."""
  base = tiny_mla.get_config()
  rules, mesh = LAYOUTS[layout]
  chosen = dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, mtp=None),
    data=dataclasses.replace(base.data, length=LENGTH, batch_size=ROWS),
    rules=rules,
    mesh=mesh,
    remat=remat,
    microbatches=microbatches,
  )
  program = build_program(chosen, jax.devices()[: 1 if layout == 'single' else 8])
  step = program.step.compile(program.abstract_state, program.abstract_batch())
  rng = np.random.default_rng(0)

  def start(path, leaf):
    if jax.tree_util.keystr(path).startswith('.params'):
      return rng.uniform(0.5, 1.5, leaf.shape) * rng.choice([-0.2, 0.2], leaf.shape)
    return np.zeros(leaf.shape)

  abstract = program.abstract_state
  state = jax.tree.map(
    lambda leaf, x: jax.device_put(np.asarray(x, leaf.dtype), leaf.sharding),
    abstract,
    jax.tree_util.tree_map_with_path(start, abstract),
  )
  tokens, targets = (rng.integers(3, 259, (ROWS, LENGTH)).astype(np.int32) for _ in range(2))
  ones = np.ones((ROWS, LENGTH), np.int32)
  positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
  batch = Batch(tokens, targets, ones.astype(np.float32), positions, ones, ones)
  state, metrics = step(state, jax.device_put(batch, program.batch_sharding))
  return flatten(jax.device_get(state.opt_state[1].mu)), jax.device_get(metrics)


def error(got, want):
  """Norm of the difference over the norm."""
  assert got.keys() == want.keys()
  difference = sum(np.sum(np.square(np.float64(got[key]) - want[key])) for key in want)
  return np.sqrt(difference / sum(np.sum(np.square(np.float64(x))) for x in want.values()))


@pytest.mark.parametrize(
  ('layout', 'microbatches'),
  [
    pytest.param('fsdp', 1, marks=pytest.mark.slow),
    pytest.param('tensor', 1, marks=pytest.mark.slow),
    pytest.param('single', 2, marks=pytest.mark.slow),
  ],
)
def test_a_mesh_changes_nothing(layout, microbatches):
  """Nor do microbatches; loads and losses are those of the exact forward pass."""
  remat = Compressed(block=8)
  (got, metrics), (want, metrics_1) = (
    one_step(remat, layout, microbatches),
    one_step(remat, 'single'),
  )
  assert error(got, want) < SAME
  np.testing.assert_allclose(metrics['loss'], metrics_1['loss'], rtol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, metrics['observed'], metrics_1['observed'])


@pytest.mark.slow
def test_rounding_is_larger_than_the_bound_above():
  """Otherwise rounding could be missing from one side unseen."""
  (rounded, metrics), (exact, metrics_1) = (
    one_step(Compressed(block=8), 'single'),
    one_step(EveryLayer(), 'single'),
  )
  assert 2 * SAME < error(rounded, exact) < 0.1
  np.testing.assert_allclose(metrics['loss'], metrics_1['loss'], rtol=1e-6)
