"""The pool of row-blocks against the memory of every query by itself; how many keys are visited."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.layers.context import packed_context
from deepseek_jax.ops.attention import blocks as visited
from deepseek_jax.ops.attention.recurrent import (
  Pool,
  empty_pool,
  find_blocks,
  join_keys,
  memory_by_definition,
  merge,
  pool_rows,
  pool_tokens,
)
from deepseek_jax.ops.attention.reference import Seen

C, M = 5, 3


def arrays(rows, length, seed=0):
  """Latents, scores, which token may be in which slot, and what exponents lose in a segment."""
  rng = np.random.default_rng(seed)
  latent = rng.standard_normal((rows, length, C)).astype(np.float32)
  scores = 2 * rng.standard_normal((rows, length, M)).astype(np.float32)
  return latent, scores, rng.random((rows, length, M)) < 0.7, np.float32([0.0, 0.3, 5.0])


def memory_of_queries(latent, scores, mask, fading, context, size):
  """What `pool_rows` and `join_keys` say of each query: the slots of its run, in key order."""
  positions, segments = jnp.asarray(context.positions), jnp.asarray(context.segments)
  row = find_blocks(positions, segments, size)
  logits = scores + fading * (positions % size / size)[..., None]
  before = empty_pool(len(latent), M, C)
  mean, there, after = pool_rows(latent, logits, mask, fading, row, before)
  places = jnp.where(segments > 0, positions, -1)
  keys = join_keys((latent, latent[..., :2]), places, row, (mean, there), size)
  runs = row.runs[:, :, None, None]
  of_slots = keys.places[:, None, :, None] == size + jnp.arange(M)
  seen = of_slots & (keys.runs[:, None, :, None] == runs) & (keys.positions >= 0)[:, None, :, None]
  seen &= (segments > 0)[:, :, None, None]
  memory = jnp.einsum('btsm,bsc->btmc', seen.astype(jnp.float32), keys.latent)
  return memory, jnp.sum(seen, axis=2), after


@pytest.mark.parametrize(
  ('length', 'size'), [(7, 1), (7, 4), (37, 8), (45, 4), (45, 64), (129, 1), (129, 16)]
)
def test_pool_is_the_memory_by_definition(length, size):
  lengths = [(length,), (3, length // 2, 1, 1, length // 4), (), (length // 3, length // 3)]
  context = packed_context(lengths, length)
  latent, scores, mask, fading = arrays(len(lengths), length)
  real = np.asarray(context.segments > 0)
  facts = (context.positions, context.segments, size)

  def fast(latent, scores, fading):
    memory, there, _ = memory_of_queries(latent, scores, mask, fading, context, size)
    return jnp.sum(jnp.sin(3 * memory) * real[..., None, None]), (memory, there)

  def slow(latent, scores, fading):
    memory, there = memory_by_definition(latent, scores, mask, fading, *facts)
    return jnp.sum(jnp.sin(3 * memory) * real[..., None, None]), (memory, there)

  found, expected = (
    jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(latent, scores, fading)
    for f in (fast, slow)
  )
  (_, (memory, there)), (_, (memory_slow, there_slow)) = found[0], expected[0]
  np.testing.assert_array_equal(there[real], there_slow[real].astype(np.int32))
  np.testing.assert_allclose(memory[real], memory_slow[real], rtol=1e-4, atol=1e-5)
  for a, b in zip(found[1], expected[1], strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
  if 2 * size < length:
    assert np.abs(expected[1][2][1:]).min() > 1e-5


def test_order_of_merging_does_not_count():
  latent, scores, mask, _ = arrays(1, 12)
  parts = [
    pool_tokens(latent[0, of], scores[0, of], mask[0, of])
    for of in (slice(0, 1), slice(1, 8), slice(8, 12))
  ]
  whole = pool_tokens(latent[0], scores[0], mask[0])
  ways = [merge(merge(*parts[:2]), parts[2]), merge(parts[0], merge(*parts[1:]))]
  ways.append(merge(merge(parts[2], Pool(*(x[0] for x in empty_pool(1, M, C)))), merge(*parts[:2])))
  for found in ways:
    np.testing.assert_allclose(found.mean()[0], whole.mean()[0], rtol=1e-5, atol=1e-6)


def test_long_documents_stay_exact():
  """Exponents relative to the start of the document would be 5,000 at the end of this one."""
  latent, scores, mask, _ = arrays(1, 4003)
  fading = np.float32([0.0, 1e-3, 5.0])
  context = packed_context([(4003,)])
  pool = jax.jit(lambda *arrays: memory_of_queries(*arrays, context, 4)[2])
  after = pool(latent, scores, mask, fading)
  place = np.arange(4003) / 4
  for j in range(M):
    exponents = scores[0, :, j].astype(np.float64) + fading[j] * (place - place[-1])
    weights = np.where(mask[0, :, j], np.exp(exponents - exponents.max()), 0)
    want = weights @ latent[0] / weights.sum()
    np.testing.assert_allclose(after.mean()[0][0, j], want, rtol=1e-4, atol=1e-5)
  assert np.abs(np.asarray(after.top)).max() < 20


@pytest.mark.parametrize('size', [64, 512])
def test_a_query_visits_as_many_keys_in_long_rows_as_in_short_ones(size):
  @jax.jit
  def visits(positions, segments):
    row = find_blocks(positions, segments, size)
    pieces = row.older.shape[0]
    memory = jnp.zeros((pieces, 1, M, 1)), jnp.ones((pieces, 1, M), bool)
    token = jnp.zeros((*positions.shape, 1))
    keys = join_keys((token, token), positions, row, memory, size)
    seen = Seen(positions, keys.positions, row.runs, keys.runs)
    layout = visited.plan_layout(token[:, :, None], keys.latent[:, :, None], 256, None)
    return visited.make_plan(seen, None, None, False, layout).visits.touched

  for length in (2048, 16_384):
    context = packed_context([(length,)])
    found = visits(context.positions, context.segments)
    assert found.size >= length // 256
    assert 1 <= found.min() <= found.max() <= 2 + -(-size // 256)
