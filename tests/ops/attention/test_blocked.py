"""Attention in blocks against its slow twin: forward, gradients, and what it visits and keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.ops.attention import blocked, blocks, long_rows
from deepseek_jax.ops.attention.blocked import attend_blocked
from deepseek_jax.ops.attention.blocks import Extras
from deepseek_jax.ops.attention.reference import Seen, attend_seen
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh

B, H, K, V = 2, 4, 6, 5


@pytest.fixture(params=['short', 'long'])
def form(request, monkeypatch):
  """Each of the two forms, the one for long rows with many small blocks."""
  monkeypatch.setattr(blocked, 'SHORT', 1 << 20 if request.param == 'short' else 0)
  monkeypatch.setattr(long_rows, 'SIDE', 16)
  monkeypatch.setattr(long_rows, 'CELLS', 16 * 16 * 2)


def drawn(seed=0):
  rng = np.random.default_rng(seed)
  return lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)


def packed(length):
  """Documents one after another and padding at the end, which is segment 0."""
  rng = np.random.default_rng(length)
  segments = np.sort(rng.integers(1, 5, (B, length)), axis=1).astype(np.int32)
  starts = np.stack([np.searchsorted(row, row) for row in segments])
  positions = (np.arange(length) - starts).astype(np.int32)
  segments, positions = (np.where(segments == 4, 0, x) for x in (segments, positions))
  return Seen(positions, positions, segments, segments)


def both(function, arrays, grad):
  """Outputs and the gradients of all arrays."""

  @jax.jit
  def run(*arrays):
    out, back = jax.vjp(function, *arrays)
    return out, *back(grad)

  return run(*arrays)


def compare(seen, queries, keys, groups, window=None, in_order=False, extras=False):
  draw = drawn()
  arrays = [draw(B, queries, H, K), draw(B, keys, groups, K), draw(B, keys, groups, V)]
  arrays += [draw(B, keys), draw(H)] if extras else []

  def run(attend, q, k, v, *extra):
    return attend(q, k, v, seen, *extra, scale=0.4, window=window)

  def ours(q, k, v, seen, *extra, **fields):
    return attend_blocked(q, k, v, seen, extras=Extras(*extra), in_order=in_order, **fields)

  def twin(q, k, v, seen, *extra, **fields):
    return attend_seen(q, k, v, seen, **dict(zip(('key_bias', 'sinks'), extra)), **fields)

  # In order, what padding sees is whatever is quick: it gives no gradient.
  real = np.ones((B, queries), bool) if not in_order else seen.query_segments > 0
  assert real.any()
  grad = draw(B, queries, H, V) * real[:, :, None, None]
  got = both(functools.partial(run, ours), arrays, grad)
  want = both(functools.partial(run, twin), arrays, grad)
  assert len(got) == 1 + len(arrays)
  for a, b in zip(got, want, strict=True):
    assert a.dtype == b.dtype
    if queries > 1:
      assert np.abs(b).max() > 0.05
    assert np.all(np.isfinite(a))
    a, b = (x * real[:, :, None, None] if x is out else x for x, out in ((a, got[0]), (b, want[0])))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-6)


@pytest.mark.usefixtures('form')
@pytest.mark.parametrize(
  ('length', 'groups', 'window'),
  [(1, 4, None), (7, 2, (3, 1)), (37, 1, None), (45, 4, (5, 0)), (129, 4, (20, 2))],
)
def test_packed_rows(length, groups, window):
  compare(packed(length), length, length, groups, window, in_order=True, extras=length != 129)


@pytest.mark.usefixtures('form')
@pytest.mark.parametrize('segments', [False, True])
def test_rows_in_no_order(segments):
  """Keys of a cache, some slots of it empty; or all tokens of a segment, later ones too."""
  rng = np.random.default_rng(1)
  if segments:
    q = k = np.zeros((B, 45), np.int32)
    parts = rng.integers(0, 3, (B, 45)).astype(np.int32)
    compare(Seen(q, k, parts, parts), 45, 45, 2)
  else:
    k = np.stack([rng.permutation(50) for _ in range(B)]).astype(np.int32)
    k[:, ::3] = -1
    q = np.stack([np.arange(20, 27), np.arange(40, 47)]).astype(np.int32)
    compare(Seen(q, k), 7, 50, 2, extras=True)


@pytest.mark.usefixtures('form')
@pytest.mark.parametrize('sinks', [None, 0.5])
def test_a_query_that_sees_nothing(sinks):
  draw = drawn()
  q = np.array([[0, 1, 2], [3, 4, 5]], np.int32)
  k = np.array([[-1] * 20, [5] * 20], np.int32)
  arrays = draw(B, 3, H, K), draw(B, 20, H, K), draw(B, 20, H, V)
  logits = None if sinks is None else jnp.full(H, sinks)
  run = functools.partial(attend_blocked, seen=Seen(q, k), scale=1.0, extras=Extras(None, logits))
  out, *grads = both(run, arrays, draw(B, 3, H, V))
  assert not np.any(out[0])
  assert not np.any(out[1, :2])
  assert np.all(out[1, 2] != 0)
  assert all(np.all(np.isfinite(x)) for x in grads)
  assert not np.any(grads[0][0])
  assert np.any(grads[0][1, 2])


@pytest.mark.usefixtures('form')
def test_bfloat16_adds_up_in_float32():
  """2,048 equal values: a sum in bfloat16 would stop at 256, and the mean at an eighth."""
  q, k = jnp.zeros((1, 1, 1, K), jnp.bfloat16), jnp.zeros((1, 2048, 1, K), jnp.bfloat16)
  places = np.arange(2048, dtype=np.int32)[None]
  seen = Seen(places[:, -1:], places)
  got = attend_blocked(q, k, jnp.ones((1, 2048, 1, V), jnp.bfloat16), seen, scale=1.0)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, 1)


@pytest.mark.usefixtures('form')
def test_bfloat16():
  draw, places = drawn(), np.tile(np.arange(37, dtype=np.int32), (B, 1))
  seen = Seen(places, places)
  exact = [draw(B, 37, H, K), draw(B, 37, 2, K), draw(B, 37, 2, V)]
  grad = draw(B, 37, H, V)
  arrays = [x.astype(jnp.bfloat16) for x in exact]
  run = functools.partial(attend_blocked, seen=seen, scale=0.4, in_order=True)
  twin = functools.partial(attend_seen, seen=seen, scale=0.4)
  got = both(run, arrays, grad.astype(jnp.bfloat16))
  for a, b in zip(got, both(twin, exact, grad), strict=True):
    assert a.dtype == jnp.bfloat16
    assert float(jnp.max(jnp.abs(a - b))) < 0.04 * float(jnp.max(jnp.abs(b)))


@pytest.mark.parametrize('keys', [256, 4096])
def test_gradient_keeps_no_weights(keys):
  """What is kept is [B, T, …]: nothing is of the size of all pairs; nor is it held for a while."""
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
  arrays = shape(1, keys, H, 8), shape(1, keys, H, 8), shape(1, keys, H, 8)
  places = jnp.arange(keys, dtype=jnp.int32)[None]
  run = functools.partial(attend_blocked, seen=Seen(places, places), scale=1.0, in_order=True)
  kept = jax.eval_shape(lambda *a: jax.vjp(run, *a)[1], *arrays)
  sizes = [x.size for x in jax.tree.leaves(kept)]
  assert sizes
  assert max(sizes) == keys * H * 8
  if keys > blocked.SHORT:
    step = jax.jit(jax.grad(lambda *a: jnp.sum(run(*a)), argnums=(0, 1, 2)))
    held = step.lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    # A score of each pair would be four times that.
    assert held < keys * keys * H


def test_long_rows_on_a_mesh(monkeypatch):
  """Rows and heads stay where they are: nothing is gathered, and the results are the same."""
  monkeypatch.setattr(blocked, 'SHORT', 0)
  monkeypatch.setattr(long_rows, 'SIDE', 16)
  draw, length = drawn(), 45
  arrays = [draw(B, length, H, K), draw(B, length, H, K), draw(B, length, H, V)]
  grad, seen = draw(B, length, H, V), packed(length)
  grad *= (seen.query_segments > 0)[:, :, None, None]
  run = functools.partial(attend_blocked, seen=seen, scale=0.4, in_order=True)

  def step(*arrays):
    out, back = jax.vjp(run, *arrays)
    return out, *back(grad)

  mesh = make_mesh(MeshConfig(data=2, model=4), jax.devices()[:8])
  layout = NamedSharding(mesh, PartitionSpec('data', None, 'model'))
  want = jax.jit(step)(*arrays)
  with jax.set_mesh(mesh):
    made = jax.jit(step, out_shardings=layout).lower(*jax.device_put(arrays, layout)).compile()
    got = made(*jax.device_put(arrays, layout))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-6)
  text = made.as_text()
  assert f'f32[{B // 2},' in text
  assert 'all-to-all' not in text
  assert not [line for line in text.splitlines() if 'all-gather(' in line and 'f32' in line]


def cut(length, window=None, segments=None, side=16):
  places = jnp.arange(length, dtype=jnp.int32)[None]
  if segments is not None:
    starts = jnp.searchsorted(segments[0], segments[0])
    places = places - starts[None]
  q = jnp.zeros((1, length, 1, 2))
  layout = blocks.plan_layout(q, q, side, side * side)
  seen = Seen(places, places, segments, segments)
  plan = blocks.make_plan(seen, None, window, True, layout)
  return jax.tree.map(np.asarray, plan.visits)


def test_visits_of_a_causal_row():
  visits = cut(64)
  np.testing.assert_array_equal(visits.touched, [[1, 2, 3, 4]])
  np.testing.assert_array_equal(visits.whole, [[0, 1, 2, 3]])
  # The block on the diagonal comes last: it alone is masked.
  assert visits.order[0, 2, :3].tolist() == [0, 1, 2]


def test_a_window_visits_as_many_blocks_however_long_the_row():
  visits = cut(1024, window=(16, 2))
  # Its own, the one before, and the one that holds the first tokens.
  assert visits.touched[0].tolist() == [1, 2] + [3] * 62


def test_packed_rows_visit_their_own_documents():
  segments = jnp.repeat(jnp.arange(1, 5, dtype=jnp.int32), 64)[None]
  visits = cut(256, segments=segments)
  np.testing.assert_array_equal(visits.touched, [[1, 2, 3, 4] * 4])
  np.testing.assert_array_equal(visits.whole, [[0, 1, 2, 3] * 4])
  assert sorted(visits.order[0, 6, :3]) == [4, 5, 6]


def test_block_lengths_are_even():
  assert [blocks.block_length(n, 256) for n in (1, 256, 257, 600)] == [1, 256, 136, 200]
