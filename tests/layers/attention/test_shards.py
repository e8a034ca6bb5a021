"""Attention on a mesh, every device for its own rows and heads, is attention on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding

from deepseek_jax.layers.attention.shards import (
  attend_chosen_sharded,
  attend_groups_sharded,
  attend_sharded,
)
from deepseek_jax.layers.context import packed_context
from deepseek_jax.ops.attention.blocks import Extras
from deepseek_jax.ops.attention.gathered import KeySets, Selected, attend_blocks, attend_selected
from deepseek_jax.ops.attention.reference import Seen, attend_seen
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from deepseek_jax.sharding.presets import FSDP, TENSOR
from deepseek_jax.sharding.rules import Rules

H, K, V = 8, 12, 8
LENGTHS = ([20, 17], [37], [1, 30], [5, 5, 5])


def draw(batch, length, groups, seed=0):
  rng = np.random.default_rng(seed)
  shapes = ((H, K), (groups, K), (groups, V), (H, V))
  return [jnp.asarray(rng.standard_normal((batch, length, *s)), jnp.float32) for s in shapes]


def on_a_mesh(attend, grad, *arrays):
  """Value and gradients of `attend` on eight devices, each for its own rows and heads."""
  with jax.set_mesh(make_mesh(MeshConfig(data=2, model=4))):

    @jax.jit
    def both(*arrays):
      out, pull = jax.vjp(attend, *arrays)
      return out, pull(grad)

    assert 'manual_computation' in both.lower(*arrays).as_text()
    return both(*arrays)


@pytest.mark.parametrize('window', [None, (8, 2)])
@pytest.mark.parametrize(
  ('rows', 'groups'),
  # Key heads for every device; one for all; two for four devices; rows that devices do not divide.
  [(4, 8), (4, 1), (4, 2), (1, 8)],
)
def test_values_and_gradients(rows, groups, window):
  query, key, value, grad = draw(rows, 37, groups)
  seen = packed_context(LENGTHS[:rows], 37).own()
  facts = {'seen': seen, 'scale': 0.3, 'window': window}
  want, pull = jax.vjp(functools.partial(attend_seen, **facts), query, key, value)
  attend = functools.partial(attend_sharded, **facts, rules=TENSOR, in_order=True)
  out, grads = on_a_mesh(attend, grad, query, key, value)
  for a, b in zip((out, *grads), (want, *pull(grad)), strict=True):
    real = np.asarray(seen.query_segments > 0)[..., None, None]
    np.testing.assert_allclose(a * real, b * real, atol=1e-5)


def test_the_compiler_is_left_to_spread_sequences():
  query, key, value, _ = draw(2, 32, 8)
  seen = packed_context([[32], [32]]).own()
  rules = Rules(batch=('data',), seq=('model',))
  with jax.set_mesh(make_mesh(MeshConfig(data=2, model=4))):
    attend = functools.partial(attend_sharded, seen=seen, rules=rules, scale=0.3, in_order=True)
    text = jax.jit(attend).lower(query, key, value).as_text()
  assert 'manual_computation' not in text


@functools.partial(jax.jit, static_argnames='rules')
def step(query, key, value, positions, segments, rules):
  seen = Seen(positions, positions, segments, segments)

  def loss(*arrays):
    out = attend_sharded(*arrays, seen, rules, scale=0.1, in_order=True)
    return jnp.sum(out.astype(jnp.float32) ** 2)

  return jax.value_and_grad(loss, argnums=(0, 1, 2))(query, key, value)


def shapes(mesh, rules):
  leaf = lambda axes, *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(  # noqa: E731
    shape, dtype, sharding=NamedSharding(mesh, rules.spec(axes))
  )
  heads = ('batch', None, 'act_heads', None)
  facts = leaf(('batch', None), 4, 1024, dtype=jnp.int32)
  arrays = [leaf(heads, 4, 1024, H, dim) for dim in (128, 128, 128)]
  return *arrays, facts, facts


@pytest.mark.parametrize('rules', [FSDP, TENSOR], ids=['fsdp', 'tensor'])
def test_a_pod_runs_kernels(rules):
  """The compiler could not spread them over chips by itself."""
  mesh = make_mesh(MeshConfig(data=2, model=4))
  with jax.set_mesh(mesh):
    traced = step.trace(*shapes(mesh, rules), rules=rules)
    text = traced.lower(lowering_platforms=('tpu',)).as_text()
  assert text.count('@tpu_custom_call(') == 3


@pytest.mark.slow
@pytest.mark.parametrize('rules', [FSDP, TENSOR], ids=['fsdp', 'tensor'])
def test_a_pod_compiles(rules, monkeypatch):
  """Four chips that are not here: kernels, and nothing that travels between them."""
  pytest.importorskip('libtpu')
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  devices = topologies.get_topology_desc('v5p:2x2x1', 'tpu').devices
  mesh = make_mesh(MeshConfig(data=2, model=2), devices)
  with jax.set_mesh(mesh):
    text = step.lower(*shapes(mesh, rules), rules=rules).compile().as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 3
  assert 'all-gather' not in text


@pytest.mark.parametrize('rows', [4, 1])
@pytest.mark.parametrize('form', ['each', 'blocks', 'expanded'])
def test_chosen_keys(form, rows):
  """Sets of a query or of a block; one key of all heads or one a head; weights, biases, sinks."""
  query, key, value, grad = draw(rows, 37, H if form == 'expanded' else 1)
  rng = np.random.default_rng(1)
  block = 1 if form == 'each' else 8
  lists = [[rng.permutation(37)[:9] for _ in range(-(-37 // block))] for _ in range(rows)]
  indices = jnp.asarray(np.array(lists), jnp.int32)
  seen = None if form == 'each' else packed_context(LENGTHS[:rows], 37).own()
  bias = jnp.asarray(rng.standard_normal((rows, 37)), jnp.float32)
  options = {'scale': 0.3, 'mass': True}
  if form != 'expanded':
    key, value = key[:, :, 0], None

  def plain(query, key, value, extras):
    value, facts = V if value is None else value, extras._asdict()
    if seen is None:
      return attend_selected(query, key, value, indices, **facts, **options)
    return attend_blocks(query, key, value, KeySets(indices, block, seen), **facts, **options)

  sinks = jnp.asarray(rng.standard_normal(H), jnp.float32)
  arrays = (query, key, value, Extras(bias, sinks))
  want, pull = jax.vjp(plain, *arrays)
  grad = Selected(grad, jnp.zeros_like(want.mass))

  def spread(query, key, value, extras):
    value, sets = V if value is None else value, KeySets(indices, block, seen)
    return attend_chosen_sharded(query, key, value, sets, TENSOR, extras=extras, **options)

  found = jax.tree.leaves(on_a_mesh(spread, grad, *arrays))
  wanted = jax.tree.leaves((want, pull(grad)))
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(('rows', 'groups'), [(4, 4), (2, 2), (1, 4)])
def test_groups_that_choose_for_themselves(rows, groups):
  """Groups for every device; fewer, which are whole on each; rows that devices do not divide."""
  query, key, value, grad = draw(rows, 37, groups)
  rng = np.random.default_rng(2)
  lists = [[[rng.permutation(37)[:9] for _ in range(groups)] for _ in range(37)] for _ in query]
  indices = jnp.asarray(np.array(lists), jnp.int32)
  seen = np.zeros((rows, 37, groups, 37), bool)
  np.put_along_axis(seen, np.array(lists), True, axis=-1)

  def plain(query, key, value):
    split = query.reshape(rows, 37, groups, -1, K)
    scores = jnp.einsum('btgjk,bsgk->btgjs', split, key) * 0.3
    weights = jax.nn.softmax(jnp.where(seen[:, :, :, None], scores, -jnp.inf))
    return jnp.einsum('btgjs,bsgv->btgjv', weights, value).reshape(rows, 37, H, V)

  want, pull = jax.vjp(plain, query, key, value)
  attend = functools.partial(attend_groups_sharded, indices=indices, rules=TENSOR, scale=0.3)
  out, grads = on_a_mesh(attend, grad, query, key, value)
  for a, b in zip((out, *grads), (want, *pull(grad)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@functools.partial(jax.jit, static_argnames='rules')
def chosen_step(query, key, indices, rules):
  def loss(query, key):
    sets = KeySets(indices)
    out, mass = attend_chosen_sharded(query, key, 512, sets, rules, scale=0.1, mass=True)
    return jnp.sum(out.astype(jnp.float32) ** 2), mass

  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(query, key)


def chosen_shapes(mesh, rules):
  leaf = lambda axes, *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(  # noqa: E731
    shape, dtype, sharding=NamedSharding(mesh, rules.spec(axes))
  )
  query = leaf(('batch', None, 'act_heads', None), 4, 1024, 32, 576)
  indices = leaf(('batch', None, None), 4, 1024, 256, dtype=jnp.int32)
  return query, leaf(('batch', None, None), 4, 1024, 576), indices


@pytest.mark.parametrize('rules', [FSDP, TENSOR], ids=['fsdp', 'tensor'])
def test_a_pod_runs_kernels_of_chosen_keys(rules):
  mesh = make_mesh(MeshConfig(data=2, model=4))
  with jax.set_mesh(mesh):
    traced = chosen_step.trace(*chosen_shapes(mesh, rules), rules=rules)
    text = traced.lower(lowering_platforms=('tpu',)).as_text()
  assert text.count('@tpu_custom_call(') == 2


@pytest.mark.slow
@pytest.mark.parametrize('rules', [FSDP, TENSOR], ids=['fsdp', 'tensor'])
def test_a_pod_compiles_kernels_of_chosen_keys(rules, monkeypatch):
  """What travels is a sum of gradients and of weights, over the devices that share a row."""
  pytest.importorskip('libtpu')
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  devices = topologies.get_topology_desc('v5p:2x2x1', 'tpu').devices
  mesh = make_mesh(MeshConfig(data=2, model=2), devices)
  with jax.set_mesh(mesh):
    text = chosen_step.lower(*chosen_shapes(mesh, rules), rules=rules).compile().as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 2
  assert 'all-gather' not in text
