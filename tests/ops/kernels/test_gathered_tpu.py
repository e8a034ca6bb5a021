"""The TPU's kernels against the slow twin, step by step on this machine, and compiled for chips."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from deepseek_jax.ops.attention import gathered
from deepseek_jax.ops.attention.gathered import KeySets, Selected, attend_blocks, attend_selected
from deepseek_jax.ops.attention.gathered_loop import Form
from deepseek_jax.ops.attention.reference import MASKED, Seen, visible
from deepseek_jax.ops.kernels import gathered_plan, gathered_steps, gathered_tpu
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh

B, H = 2, 8
SMALL, FULL = (6, 5), (320, 256)
"""Channels of a key and of a value; the latter fill whole vectors, two numbers in a word."""


@pytest.fixture
def kernels(monkeypatch):
  """Call it with what a cut has to be: the kernels then run where the compiler's loop would."""
  forms = types.SimpleNamespace(
    forward=functools.partial(gathered_tpu.forward, interpret=True),
    backward=functools.partial(gathered_tpu.backward, interpret=True),
  )
  monkeypatch.setattr(gathered, 'gathered_loop', forms)
  # It is the compiler on this machine that has to unroll.
  monkeypatch.setattr(gathered_steps, 'UNROLL', 2)

  def ask(**wanted):
    def size(form, row, cut, *_):
      del form, row
      return 1 << 40 if any(getattr(cut, name) != x for name, x in wanted.items()) else 0

    monkeypatch.setattr(gathered_plan, 'vmem_bytes', size)

  return ask


def draw(length, groups, apart, sizes, dtype):
  """Query, key, value (None where the key begins with it), bias, sinks; and a gradient."""
  K, V = sizes
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
  value = normal(B, length, groups, V) if apart else None
  bias, sinks = (normal(*shape).astype(jnp.float32) for shape in ((B, length), (H,)))
  key = normal(B, length, groups, K)
  return (normal(B, length, H, K), key, value, bias, sinks), normal(B, length, H, V)


def choose(length, count, block):
  """Keys of each block [B, N, count] in any order, with holes; some blocks have none."""
  rng = np.random.default_rng(1)
  blocks = -(-length // block)
  indices = np.full((B, blocks, count), -1, np.int32)
  for b, n in np.ndindex(B, blocks):
    last = min((n + 1) * block, length)
    keys = rng.permutation(last)[: min(count, last) - (last > 3)]
    indices[b, n, rng.permutation(count)[: len(keys)]] = keys
  indices[1, -1] = -1
  if blocks > 1:
    indices[0, blocks // 2] = -1
  return jnp.asarray(indices)


def packed(length):
  """Two documents and padding; one document."""
  positions = np.tile(np.arange(length, dtype=np.int32), (B, 1))
  segments = np.ones((B, length), np.int32)
  cut, end = length // 3, length - 2
  positions[0, cut:] -= cut
  segments[0, cut:], segments[0, end:] = 2, 0
  return Seen(*map(jnp.asarray, (positions, positions, segments, segments)))


def twin(query, key, value, bias, sinks, sets, width):
  """All pairs at once, in float32, and the weights of the chosen keys, summed over heads."""
  indices, block, seen = sets
  value = key[..., :width] if value is None else value
  q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
  k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
  of_tokens = jnp.repeat(indices, block, axis=1)[:, : q.shape[1]]
  mask = jnp.any(of_tokens[..., None] == jnp.arange(k.shape[1]), axis=2)
  if seen is not None:
    mask &= visible(*seen)
  scores = jnp.einsum('bthk,bshk->bhts', q, k) * scale_of(q) + bias[:, None, None]
  sink = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
  scores = jnp.concatenate([jnp.where(mask[:, None], scores, MASKED), sink], axis=-1)
  weights = jax.nn.softmax(scores, axis=-1)[..., :-1]
  out = jnp.einsum('bhts,bshv->bthv', weights, v)
  found = jnp.take_along_axis(jnp.sum(weights, axis=1), jnp.maximum(of_tokens, 0), axis=2)
  return Selected(out, jnp.where(of_tokens >= 0, found, 0.0))


def scale_of(query):
  return 1.5 * query.shape[-1] ** -0.5


def check(arrays, grad, sets):
  """Compares outputs, weights of the keys, and gradients."""
  width = grad.shape[-1]

  def fast(query, key, value, bias, sinks):
    given = query, key, width if value is None else value
    options = {'scale': scale_of(query), 'key_bias': bias, 'sinks': sinks, 'mass': True}
    if sets.block == 1:
      return attend_selected(*given, sets.indices, **options)
    return attend_blocks(*given, sets, **options)

  def both_ways(function):
    def run(arrays):
      found, pull = jax.vjp(function, *arrays)
      back = Selected(grad.astype(found.out.dtype), jnp.zeros_like(found.mass))
      return found, pull(back)

    return jax.jit(run)(arrays)

  found, wanted = both_ways(fast), both_ways(functools.partial(twin, sets=sets, width=width))
  tolerance = 1e-5 if grad.dtype == jnp.float32 else 0.02
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert np.abs(b).max() > 0.1
    assert np.abs(a - b).max() < tolerance * np.abs(b).max()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  ('length', 'count', 'kind', 'wanted'),
  [
    (45, 9, (1, False, FULL, 'float32'), {'resident': False}),
    pytest.param(7, 3, (1, True, SMALL, 'bfloat16'), {'resident': True}, marks=SLOW),
    pytest.param(45, 9, (1, True, FULL, 'bfloat16'), {'resident': True}, marks=SLOW),
    pytest.param(129, 20, (1, False, SMALL, 'bfloat16'), {'resident': False}, marks=SLOW),
  ],
)
def test_each_query_has_keys_of_its_own(length, count, kind, wanted, kernels):
  """The kind: groups of heads, whether values are apart, sizes, dtype."""
  kernels(**wanted)
  check(*draw(length, *kind), KeySets(choose(length, count, 1)))


@pytest.mark.parametrize(
  ('length', 'count', 'block', 'kind', 'wanted'),
  [
    (129, 131, 16, (1, False, FULL, 'bfloat16'), {'resident': True, 'repeat': 2}),
    pytest.param(7, 7, 8, (8, True, SMALL, 'float32'), {'chunks': 2}, marks=SLOW),
    pytest.param(
      45, 30, 8, (4, True, SMALL, 'bfloat16'), {'resident': False, 'chunks': 2}, marks=SLOW
    ),
    pytest.param(129, 131, 8, (1, False, SMALL, 'float32'), {'sets': 4}, marks=SLOW),
    pytest.param(129, 131, 8, (1, False, (256, 256), 'bfloat16'), {'resident': False}, marks=SLOW),
  ],
)
def test_blocks_of_packed_queries_share_keys(length, count, block, kind, wanted, kernels):
  kernels(**wanted)
  sets = KeySets(choose(length, count, block), block, packed(length))
  check(*draw(length, *kind), sets)


def step(query, key, indices, positions, block, value):
  def loss(query, key):
    if block == 1:
      out = attend_selected(query, key, value, indices, scale=0.1, mass=True).out
    else:
      sets = KeySets(indices, block, Seen(positions, positions, positions, positions))
      out = attend_blocks(query, key, value, sets, scale=0.1, mass=True).out
    return jnp.sum(out.astype(jnp.float32) ** 2)

  return jax.value_and_grad(loss, argnums=(0, 1))(query, key)


def shapes(length, heads, count, block, key_dim=576, keys=None, dtype=jnp.bfloat16, sharding=None):
  leaf = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
  return (
    leaf((1, length, heads, key_dim), dtype),
    leaf((1, keys or length, key_dim), dtype),
    leaf((1, -(-length // block), count), jnp.int32),
    leaf((1, length), jnp.int32),
  )


@pytest.mark.parametrize(
  ('platform', 'change', 'kernels'),
  [
    ('tpu', {}, 2),
    ('tpu', {'length': 129, 'heads': 8, 'block': 8}, 2),
    ('tpu', {'dtype': jnp.float32}, 2),
    # The gradient of so many keys does not fit into the chip's memory.
    ('tpu', {'keys': 1 << 14, 'count': 128}, 1),
    ('tpu', {'length': 1, 'keys': 1024}, 0),
    ('tpu', {'heads': 8, 'block': 12}, 0),
    ('tpu', {'heads': 4, 'block': 8}, 0),
    ('tpu', {'dtype': jnp.float16}, 0),
    ('tpu', {'key_dim': 96}, 0),
    ('cpu', {}, 0),
    ('cuda', {}, 0),
  ],
  ids=str,
)
def test_each_platform_has_its_form(platform, change, kernels):
  sizes = {'length': 128, 'heads': 4, 'count': 128, 'block': 1, **change}
  value = min(512, sizes.get('key_dim', 512) - 64)
  run = functools.partial(step, block=sizes['block'], value=value)
  text = jax.jit(run).trace(*shapes(**sizes)).lower(lowering_platforms=(platform,)).as_text()
  assert text.count('@tpu_custom_call(') == kernels
  assert ('stablehlo.while' in text) == (kernels < 2)


def test_arrays_that_a_compiler_spreads_have_no_kernel():
  query, key, indices, _ = shapes(128, 4, 128, 1)
  form = Form(0.1, 576, (0, 512), 1, 1, True)
  rows = jax.ShapeDtypeStruct((1, 1, *key.shape[1:]), key.dtype)
  assert gathered_tpu.fits(form, query, rows, indices)
  with jax.set_mesh(make_mesh(MeshConfig(data=8))):
    assert not gathered_tpu.fits(form, query, rows, indices)


@pytest.mark.slow
@pytest.mark.parametrize('chip', ['v5p:2x2x1', 'v6e:2x2x1'])
@pytest.mark.parametrize(
  'case',
  [(4096, 16, 512, 1), (4096, 16, 640, 64), (4096, 16, 512, 1, 576, 1 << 16)],
  ids=['each', 'blocks', 'far'],
)
def test_tpu_compiles(chip, case, monkeypatch):
  """Forward and gradient for chips that are not here."""
  pytest.importorskip('libtpu')
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  # Tests run in several processes; libtpu would be for one alone.
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  device = topologies.get_topology_desc(chip, 'tpu').devices[0]
  arguments = shapes(*case, sharding=SingleDeviceSharding(device))
  run = jax.jit(functools.partial(step, block=case[3], value=512))
  text = run.lower(*arguments).compile().as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == (1 if len(case) > 4 else 2)
