"""Padding costs no expert's time and changes no token's result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe.dispatch.local import Local
from deepseek_jax.layers.moe.interface import Assignment
from deepseek_jax.ops.expert_rows import ExpertWeights
from deepseek_jax.ops.experts import apply_experts_reference
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from deepseek_jax.sharding.presets import EXPERT, FSDP

BATCH, LENGTH, WIDTH, HIDDEN, EXPERTS = 8, 5, 8, 7, 4


@pytest.mark.parametrize('rules', [None, FSDP, EXPERT], ids=['one', 'fsdp', 'expert'])
def test_padding_has_no_expert(rules):
  """Rows end at different places; what a padding token chose is not run."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
  x, count = normal(BATCH * LENGTH, WIDTH), BATCH * LENGTH
  inward, outward = (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
  matrices = ExpertWeights(gate=normal(*inward), up=normal(*inward), down=normal(*outward))
  chosen = rng.permuted(np.tile(np.arange(EXPERTS), (count, 1)), axis=1)[:, :2]
  weights = jnp.abs(normal(count, 2))
  scores = jnp.zeros((count, EXPERTS))
  assignment = Assignment(experts=jnp.asarray(chosen), weights=weights, scores=scores)
  offsets = np.broadcast_to(np.arange(LENGTH), (BATCH, LENGTH))
  real = offsets < rng.integers(0, LENGTH + 1, (BATCH, 1))
  assert 0 < real.sum() < count
  context = Context(
    tokens=jnp.zeros((BATCH, LENGTH), jnp.int32),
    positions=jnp.asarray(offsets),
    segments=jnp.asarray(real, jnp.int32),
    **({} if rules is None else {'rules': rules}),
  )

  def run(x):
    return Local()(x, assignment, matrices, context)[0]

  if rules is None:
    found = jax.jit(run)(x)
  else:
    with jax.set_mesh(make_mesh(MeshConfig(data=4, expert=2))):
      found = jax.jit(run)(x)
  expected = apply_experts_reference(x, assignment.experts, weights, matrices)
  expected = jnp.where(real.reshape(-1, 1), expected, 0)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
