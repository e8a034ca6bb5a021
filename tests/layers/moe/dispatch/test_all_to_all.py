"""Expert parallelism: what a bound drops, one row on many devices, what is refused, and lowering.

That nothing else is changed by it, in any layout, is tests/parity/test_moe.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.override import override
from deepseek_jax.layers.context import text_context
from deepseek_jax.layers.moe.dispatch.all_gather import AllGather
from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.layers.moe.interface import Assignment, Dispatch
from deepseek_jax.ops.experts import ExpertWeights, apply_experts_reference
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from deepseek_jax.sharding.presets import EXPERT, FSDP
from deepseek_jax.train.step import build_program

SHARDS, N, D, F, E, K = 4, 5, 4, 6, 8, 2
TENSOR = dataclasses.replace(EXPERT, expert_mlp=('model',))


def inputs(rows: int, length: int, dtype=jnp.float32):
  """Tokens, uneven choices, weights, experts."""
  draw = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(draw.standard_normal(shape), dtype)  # noqa: E731
  share = np.array([1, 1, 2, 1, 1, 6, 5, 1]) / 18
  experts = [draw.choice(E, K, replace=False, p=share) for _ in range(rows * length)]
  weights = jnp.asarray(draw.random((rows * length, K)), jnp.float32)
  matrices = ExpertWeights(normal(E, D, F), normal(E, D, F), normal(E, F, D))
  return normal(rows * length, D), np.array(experts, np.int32), weights, matrices


def layer(dispatch, experts, rows, length, rules, segments=None):
  """From tokens, weights and matrices to the sum of sines of the outputs, the outputs and facts."""
  context = text_context(jnp.zeros((rows, length), jnp.int32), rules)
  if segments is not None:
    context = dataclasses.replace(context, segments=jnp.asarray(segments))

  def run(x, weights, matrices):
    assignment = Assignment(jnp.asarray(experts), weights, jnp.zeros((rows * length, E)))
    y, facts = dispatch(x, assignment, matrices, context)
    return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, facts)

  return jax.grad(run, argnums=(0, 1, 2), has_aux=True)


def test_what_a_bound_drops():
  """A shard of two experts takes 10 rows: in order of expert, then of sender, then of token."""
  x, experts, weights, matrices = inputs(SHARDS, N)
  segments = np.ones((SHARDS, N), np.int32)
  segments[1, 3:] = 0
  dispatch = AllToAll(bound=1.0)
  assert dispatch.room(N * K, SHARDS) == 10
  kept, room = np.zeros((SHARDS * N, K)), [10] * SHARDS
  for expert in range(E):
    for n, k in zip(*np.where((experts == expert) & (segments.reshape(-1, 1) > 0))):
      kept[n, k] = room[expert // 2] > 0
      room[expert // 2] -= 1
  asked = int(segments.sum()) * K
  assert 0 < asked - kept.sum() < asked / 2

  with jax.set_mesh(make_mesh(MeshConfig(expert=SHARDS), jax.devices()[:SHARDS])):
    run = jax.jit(layer(dispatch, experts, SHARDS, N, EXPERT, segments))
    grads, (y, facts) = jax.device_get(run(x, weights, matrices))

  def reference(x, weights, matrices):
    y = apply_experts_reference(x, experts, weights * kept, matrices)
    return jnp.sum(jnp.sin(y)), y

  expected, want = jax.grad(reference, argnums=(0, 1, 2), has_aux=True)(x, weights, matrices)
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, expected)
  assert {name: int(v) for name, v in facts.items()} == {
    'choices': asked,
    'dropped': asked - kept.sum(),
  }


@pytest.mark.parametrize('dispatch', [AllToAll(), AllGather()])
def test_one_row_on_many_devices(dispatch):
  """Eight devices cannot share one row: each runs its own experts on all of it, in bfloat16."""
  assert isinstance(dispatch, Dispatch)
  x, experts, weights, matrices = inputs(1, 7, jnp.bfloat16)
  with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=2, model=2))):
    run = jax.jit(layer(dispatch, experts, 1, 7, TENSOR))
    grads, (y, facts) = jax.device_get(run(x, weights, matrices))
  assert facts == {}
  assert y.dtype == jnp.bfloat16
  wide = jax.tree.map(lambda a: a.astype(jnp.float32), (x, matrices))
  want = apply_experts_reference(wide[0], experts, weights, wide[1])
  assert np.abs(y - want).max() < 0.03 * np.abs(want).max()
  assert all(np.isfinite(g.astype(np.float32)).all() for g in jax.tree.leaves(grads))


def chosen(mesh: MeshConfig, rules=EXPERT, experts: int = 8, dispatch: str = 'AllToAll()'):
  """The tiny model with a dispatch, on a mesh."""
  changes = {'model.feed_forward.dispatch': dispatch, 'model.feed_forward.experts': experts}
  experiment, _ = override(tiny_mla.get_config(), changes)
  return dataclasses.replace(experiment, mesh=mesh, rules=rules)


@pytest.mark.parametrize('kind', ['AllToAll()', 'AllGather()'])
@pytest.mark.parametrize(
  ('experts', 'rules', 'message'),
  [
    (6, EXPERT, '6 experts cannot be shared among the 4 devices of mesh axis `expert`'),
    (8, FSDP, r'rules.expert is \(\); the preset EXPERT has them there'),
  ],
)
def test_what_does_not_fit_is_refused(kind, experts, rules, message):
  """Before anything is built, with numbers and with the way out."""
  mesh = MeshConfig(data=2, expert=4)
  with pytest.raises(ConfigError, match=message):
    build_program(chosen(mesh, rules, experts, kind))
  assert chosen(mesh, dispatch=kind).check(8) == []


def test_tokens_that_do_not_lie_along_experts_are_refused():
  """Every device of the axis would send the same tokens."""
  rules = dataclasses.replace(EXPERT, batch=('data',))
  (message,) = chosen(MeshConfig(data=2, expert=4), rules).check(8)
  assert "rules.batch is ('data',)" in message
  assert chosen(MeshConfig(data=2, expert=4), rules, dispatch='AllGather()').check(8) == []


def test_other_axes_of_experts_are_refused():
  """Also where there is no experiment that could be checked."""
  rules = dataclasses.replace(EXPERT, expert=('model',))
  x, experts, weights, matrices = inputs(SHARDS, N)
  run = layer(AllToAll(), experts, SHARDS, N, rules)
  with (
    jax.set_mesh(make_mesh(MeshConfig(expert=4, model=2))),
    pytest.raises(ConfigError, match=r'rules\.expert'),
  ):
    jax.eval_shape(run, x, weights, matrices)


@pytest.mark.parametrize('fields', [{'chunks': 0}, {'bound': 0.5}, {'bound': float('nan')}])
def test_wrong_fields(fields):
  with pytest.raises(ConfigError, match=f'`{next(iter(fields))}`'):
    AllToAll(**fields)
