"""Wherever experts lie, and however many replicas they have, the layer computes the same."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.placement import Replicas
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from deepseek_jax.sharding.presets import EXPERT
from deepseek_jax.sharding.rules import logical_axes, tree_shardings, tree_specs

D, E, P = 6, 8, 12
PLAIN = MoE(experts=E, top_k=2, hidden=3, shared=None, balance=None)
PLACED = dataclasses.replace(PLAIN, placement=Replicas(slots=P))
FILLED = {
  'as declared': np.arange(P) % E,
  'two heavy ones': [5, 0, 1, 5, 2, 3, 5, 4, 6, 5, 7, 0],
  'one heavy one': [7, 7, 7, 7, 7, 6, 5, 4, 3, 2, 1, 0],
}


def context(rows: int, length: int) -> Context:
  ids = np.zeros((rows, length), np.int32)
  return Context(tokens=ids, positions=ids, segments=ids + 1, rules=EXPERT)


@functools.cache
def made(rows: int, length: int):
  """Parameters, buffers and activations; nobody chooses expert 3, many choose expert 5.

  A layer without slots reads no more than it knows of.
  """
  module, given = PLACED.build(), context(rows, length)
  x = np.random.default_rng(rows).standard_normal((rows, length, D)).astype(np.float32)
  boxed = jax.eval_shape(module.init, jax.random.key(0), x, given)
  init = jax.jit(module.init)
  variables = nn.meta.unbox(init(jax.random.key(0), x, given))
  bias = jnp.zeros(E).at[3].set(-9.0).at[5].set(0.3)
  variables['buffers']['router']['selection_bias'] = bias
  return variables, x, logical_axes(boxed)


@functools.cache
def gradients(config: MoE, rows: int, length: int):
  """A jitted function: variables, x -> output and all gradients, load."""
  module, given = config.build(), context(rows, length)

  def run(params, buffers, x):
    def loss(params, x):
      variables = {'params': params, 'buffers': buffers}
      y, reported = module.apply(variables, x, given, mutable=['observed'])
      return jnp.sum(jnp.sin(y)), (y, reported['observed']['router']['load'])

    grads, (y, load) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return (y, grads), load

  return jax.jit(run)


def assert_same(found, expected) -> None:
  for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert np.abs(want).max() > 1e-3
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize(('rows', 'length'), [(1, 1), (5, 9)])
def test_replicas_change_nothing(rows, length):
  """Output and every gradient, whatever lies where; and other slots compile nothing anew."""
  variables, x, _ = made(rows, length)
  expected, load = gradients(PLAIN, rows, length)(**variables, x=x)
  assert load[3] == 0
  buffers = variables['buffers']
  assert buffers['slots'].dtype == jnp.int32
  np.testing.assert_array_equal(buffers['slots'], FILLED['as declared'])
  run = gradients(PLACED, rows, length)
  for slots in FILLED.values():
    found, again = run(variables['params'], {**buffers, 'slots': jnp.array(slots, jnp.int32)}, x)
    assert_same(found, expected)
    # What is counted is experts, not slots.
    np.testing.assert_array_equal(again, load)
  assert run._cache_size() == 1


def test_on_a_mesh():
  """Eight devices, four of which share the experts: the same numbers, and slots lie on all four."""
  variables, x, axes = made(8, 5)
  expected, load = gradients(PLAIN, 8, 5)(**variables, x=x)
  mesh = make_mesh(MeshConfig(data=2, expert=4), jax.devices()[:8])
  variables = jax.device_put(variables, tree_shardings(mesh, tree_specs(EXPERT, axes)))
  x = jax.device_put(x, jax.NamedSharding(mesh, EXPERT.spec(('batch', 'seq', None))))
  run = gradients(dataclasses.replace(PLACED, dispatch=AllToAll()), 8, 5)
  with jax.set_mesh(mesh):
    for slots in FILLED.values():
      filled = jax.device_put(np.array(slots, np.int32), variables['buffers']['slots'].sharding)
      buffers = {**variables['buffers'], 'slots': filled}
      found, again = jax.device_get(run(variables['params'], buffers, x))
      assert_same(found, expected)
      np.testing.assert_array_equal(again, load)
  assert run._cache_size() == 1


def test_too_few_slots():
  with pytest.raises(ConfigError, match='placement: `slots` is 7, fewer than the 8 experts'):
    dataclasses.replace(PLAIN, placement=Replicas(slots=7))
  assert (PLACED.slots, PLAIN.slots) == (P, E)
