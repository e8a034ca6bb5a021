"""Dropping what finds no room: outputs, gradients and counts against loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.override import override
from deepseek_jax.layers.context import text_context
from deepseek_jax.layers.moe.dispatch.capacity import Capacity
from deepseek_jax.layers.moe.interface import Assignment, Dispatch
from deepseek_jax.ops.experts import ExpertWeights, apply_experts_reference

N, D, F, E, K = 7, 4, 3, 4, 2
# Everybody's first choice is expert 1; nobody is E.
EXPERTS = np.array([[1, 0], [1, 2], [1, E], [1, 0], [1, 3], [1, 2], [1, 0]], np.int32)
REAL = np.array([0, 1, 1, 1, 1, 1, 1], bool)


def test_room():
  """Rounded up."""
  assert Capacity(factor=1.0).room(14, 4) == 4
  assert Capacity(factor=1.25).room(16, 4) == 5
  assert Capacity(factor=0.01).room(16, 4) == 1


def test_drops():
  """Expert 1 takes tokens 1 and 2, padding takes no room, others' weights stay."""
  draw = np.random.default_rng(0)
  x, weights = draw.standard_normal((N, D)), draw.random((N, K))
  matrices = ExpertWeights(
    *(jnp.asarray(draw.standard_normal(s), jnp.float32) for s in ((E, D, F), (E, D, F), (E, F, D)))
  )
  context = text_context(jnp.zeros((1, N), jnp.int32))
  context = dataclasses.replace(context, segments=jnp.asarray(REAL[None], jnp.int32))
  dispatch = Capacity(factor=0.5)
  assert isinstance(dispatch, Dispatch)
  assert dispatch.room(N * K, E) == 2
  kept = np.array([[0, 0], [1, 1], [1, 0], [0, 1], [0, 1], [0, 1], [0, 1]])

  @jax.jit
  def run(x, weights, matrices):
    assignment = Assignment(jnp.asarray(EXPERTS), weights, jnp.zeros((N, E)))
    y, facts = dispatch(x, assignment, matrices, context)
    return jnp.sum(jnp.sin(y)), (y, facts)

  @jax.jit
  def reference(x, weights, matrices):
    y = apply_experts_reference(x, jnp.asarray(EXPERTS), weights * kept, matrices)
    return jnp.sum(jnp.sin(y)), y

  arguments = jnp.asarray(x, jnp.float32), jnp.asarray(weights, jnp.float32), matrices
  found, (y, facts) = jax.grad(run, argnums=(0, 1, 2), has_aux=True)(*arguments)
  expected, want = jax.grad(reference, argnums=(0, 1, 2), has_aux=True)(*arguments)
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
  # The gradient of a dropped choice's weight is none; of a kept one's, some.
  assert np.all((np.abs(found[1]) > 0) == (kept > 0))
  np.testing.assert_array_equal(y[0], 0)
  assert {name: int(fact) for name, fact in facts.items()} == {'choices': 11, 'dropped': 4}


def test_chosen_by_an_override():
  """One word on the command line, with its factor."""
  change = {'model.feed_forward.dispatch': 'Capacity(factor=2.0)'}
  experiment, _ = override(tiny_mla.get_config(), change)
  assert experiment.model.feed_forward.dispatch == Capacity(factor=2.0)


@pytest.mark.parametrize('factor', [0.0, -1.0, float('nan')])
def test_wrong_factor(factor):
  with pytest.raises(ConfigError, match='`factor`'):
    Capacity(factor=factor)
