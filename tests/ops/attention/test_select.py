"""Selection of keys against sorting every score in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.attention import select
from deepseek_jax.ops.attention.reference import Seen, visible
from deepseek_jax.ops.attention.select import (
  index_scores,
  select_nearest,
  select_prefix,
  select_top_k,
  take_largest,
)

B, J, D = 2, 3, 4


def draw(length, seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  return normal(B, length, J, D), normal(B, length, D), normal(B, length, J)


def packed(length):
  positions = np.tile(np.arange(length, dtype=np.int32), (B, 1))
  segments = np.ones((B, length), np.int32)
  cut = length // 3
  positions[0, cut:] -= cut
  segments[0, cut:], segments[0, length - 1 :] = 2, 0
  return Seen(positions, positions, segments, segments)


def best(scores, mask, count):
  """The set of each query's best keys; of equal ones the lower."""
  order = sorted(np.flatnonzero(mask), key=lambda s: (-scores[s], s))
  return set(order[:count])


def as_set(indices):
  chosen = [int(s) for s in indices if s >= 0]
  assert len(chosen) == len(set(chosen))
  return set(chosen)


def test_index_scores():
  query, key, weights = draw(5)
  want = np.zeros((B, 5, 5))
  for b, t, s, j in np.ndindex(B, 5, 5, J):
    want[b, t, s] += weights[b, t, j] * max(float(query[b, t, j] @ key[b, s]), 0.0)
  np.testing.assert_allclose(index_scores(query, key, weights), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ('length', 'top_k', 'ordered'), [(1, 1, True), (7, 3, True), (37, 50, False), (45, 5, True)]
)
def test_the_best_are_found(length, top_k, ordered, monkeypatch):
  monkeypatch.setattr(select, 'BLOCK', 4)
  query, key, weights = draw(length)
  # Whole numbers: sums are exact in any order, and there are ties.
  query, key, weights = (np.round(x) for x in (query, key, weights))
  seen = packed(length)
  mask = np.asarray(visible(*seen))
  run = jax.jit(select_top_k, static_argnums=4, static_argnames='ordered')
  found = np.asarray(run(query, key, weights, seen, top_k, ordered=ordered))
  assert found.shape == (B, length, top_k)
  scores = np.asarray(index_scores(query, key, weights), np.float64)
  for b, t in np.ndindex(B, length):
    assert as_set(found[b, t]) == best(scores[b, t], mask[b, t], top_k), (b, t)
  nearest = np.asarray(select_nearest(query[:, :, 0], key, seen, top_k, ordered=ordered))
  scores = np.einsum('btd,bsd->bts', query[:, :, 0], key)
  for b, t in np.ndindex(B, length):
    assert as_set(nearest[b, t]) == best(scores[b, t], mask[b, t], top_k), (b, t)


def test_prefix(monkeypatch):
  monkeypatch.setattr(select, 'BLOCK', 2)
  scores = np.round(2 * draw(37)[1][..., 0])
  # Of 37 keys, what lies before positions 5, 0 and 30.
  last = np.array([[4, -1, 29]] * B, np.int32)
  keys = np.tile(np.arange(37, dtype=np.int32), (B, 1))
  counts = np.arange(38, dtype=np.int32) // 3
  found = np.asarray(select_prefix(scores, Seen(last, keys), jnp.asarray(counts), 12))
  for b, n in np.ndindex(B, 3):
    past = np.arange(37) <= last[b, n]
    assert as_set(found[b, n]) == best(scores[b], past, counts[past.sum()])


@pytest.mark.parametrize('top_k', [1, 40, 300])
def test_largest_of_ties_and_of_few(top_k):
  rng = np.random.default_rng(0)
  scores = rng.standard_normal((6, 300)).astype(np.float32)
  scores[1] = np.round(scores[1])
  scores[2] = 0.0
  scores[3, 5:] = -np.inf
  scores[4] = -np.inf
  scores[5, ::2] = -0.0
  found = np.asarray(jax.jit(take_largest, static_argnums=1)(scores, top_k))
  for row, indices in zip(scores, found):
    assert as_set(indices) == best(row, row > -np.inf, top_k)


def test_no_gradient():
  query, key, weights = draw(7)
  seen = packed(7)

  def total(query):
    return jnp.sum(
      select_top_k(query, key, weights, seen, 2).astype(jnp.float32) * query[0, 0, 0, 0]
    )

  grad = np.asarray(jax.grad(total)(query))
  assert np.count_nonzero(grad) == 1


def test_scores_are_never_all_there():
  length = 4096
  shape = lambda *s: jax.ShapeDtypeStruct((1, length, *s), jnp.float32)  # noqa: E731
  places = jax.ShapeDtypeStruct((1, length), jnp.int32)
  run = jax.jit(lambda q, k, w, p: select_top_k(q, k, w, Seen(p, p), 16, ordered=True))
  compiled = run.lower(shape(4, 8), shape(8), shape(4), places).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < length * length
