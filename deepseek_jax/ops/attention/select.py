"""Which keys a query attends to: the best by a cheap score of every pair, found block by block.

All pairs are looked at, but only those of a few queries exist at once. Two ways to score a pair:
the lightning indexer's, which is learnt for it, and the plain product. A third score is the key's
own, the same for all queries: `select_prefix`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.attention.reference import Seen, visible

BLOCK = 64
"""Queries whose scores exist at once."""
STAGES = 4
"""Parts a row is cut into where later keys are hidden: the scores shrink to (1 + 1 / 4) / 2."""


def index_scores(query: jax.Array, key: jax.Array, weights: jax.Array) -> jax.Array:
  """Scores every pair as the lightning indexer does: Σ_j w_j · ReLU(q_j · k).

  Args:
    query: [B, T, J, d] index queries.
    key: [B, S, d] index keys.
    weights: [B, T, J] weight of each index head.

  Returns:
    [B, T, S] float32: the scores are ranked, and rounding makes ties.

  Source: DeepSeek-V3.2-Exp, equation 1.
  """
  products = jnp.einsum('btjd,bsd->btjs', query, key, preferred_element_type=jnp.float32)
  return jnp.einsum('btjs,btj->bts', jax.nn.relu(products), weights.astype(jnp.float32))


def select_top_k(
  query: jax.Array,
  key: jax.Array,
  weights: jax.Array,
  seen: Seen,
  top_k: int,
  *,
  ordered: bool = False,
) -> jax.Array:
  """Finds the keys with the highest index scores of every query, exactly.

  Args:
    query: [B, T, J, d] index queries.
    key: [B, S, d] index keys.
    weights: [B, T, J] weight of each index head.
    seen: which keys each query may see.
    top_k: keys k of a query; more than there are is all of them.
    ordered: whether the keys are the queries' tokens in the same order, so that what comes later
      in the row is hidden and need not be scored.

  Returns:
    [B, T, k] int32 in no particular order, -1 where a query sees fewer. Of equal scores the lower
    index is taken. No gradient flows.
  """

  def score(start: jax.Array, size: int, stop: int) -> jax.Array:
    q, w = (lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (query, weights))
    products = (
      jnp.einsum('btd,bsd->bts', q[:, :, j], key[:, :stop], preferred_element_type=jnp.float32)
      for j in range(query.shape[2])
    )
    # Head by head: the heads' products together are too large for a processor's cache.
    parts = [jax.nn.relu(p) * w[:, :, j, None] for j, p in enumerate(products)]
    return sum(parts[1:], parts[0])

  query, key = lax.stop_gradient((query, key))
  weights = lax.stop_gradient(weights.astype(jnp.float32))
  return _select(score, seen, top_k, ordered)


def select_nearest(
  query: jax.Array, key: jax.Array, seen: Seen, top_k: int, *, ordered: bool = False
) -> jax.Array:
  """Finds the keys with the largest product with every query, exactly.

  Args:
    query: [B, T, K].
    key: [B, S, K].
    seen: which keys each query may see.
    top_k: keys k of a query; more than there are is all of them.
    ordered: see `select_top_k`.

  Returns:
    [B, T, k] int32 in no particular order, -1 where a query sees fewer. No gradient flows.
  """
  query, key = lax.stop_gradient((query, key))

  def score(start: jax.Array, size: int, stop: int) -> jax.Array:
    q = lax.dynamic_slice_in_dim(query, start, size, axis=1)
    return jnp.einsum('btk,bsk->bts', q, key[:, :stop], preferred_element_type=jnp.float32)

  return _select(score, seen, top_k, ordered)


def select_prefix(scores: jax.Array, seen: Seen, counts: jax.Array, most: int) -> jax.Array:
  """Finds the keys with the highest scores of their own among those that each query sees.

  Meant for one query a block: a score that is the key's own changes its rank only as keys come in,
  so that blocks of queries can share what is found, and T / block rows are ranked, not T.

  Args:
    scores: [B, S] float32, one score a key.
    seen: which keys each of N queries may see.
    counts: [S + 1] int32, how many keys are taken of 0 … S visible ones.
    most: columns m of the result, no fewer than any count.

  Returns:
    [B, N, m] int32, best first, -1 where fewer are taken. Of equal scores the lower index is taken.
  """

  def score(start: jax.Array, size: int, stop: int) -> jax.Array:
    del start
    return jnp.broadcast_to(scores[:, None, :stop], (scores.shape[0], size, stop))

  scores = lax.stop_gradient(scores.astype(jnp.float32))
  return _select(score, seen, most, False, counts)


def take_largest(scores: jax.Array, top_k: int) -> jax.Array:
  """Finds the largest entries of each row, exactly; -∞ is never taken.

  Args:
    scores: [..., S] float32.
    top_k: entries k.

  Returns:
    [..., min(k, S)] int32, largest first, -1 where a row has fewer. Of equal entries the lower
    index is taken.
  """
  values, indices = lax.top_k(scores, min(top_k, scores.shape[-1]))
  return jnp.where(values > -jnp.inf, indices.astype(jnp.int32), -1)


def _select(
  score: Callable[[jax.Array, int, int], jax.Array],
  seen: Seen,
  top_k: int,
  ordered: bool,
  counts: jax.Array | None = None,
) -> jax.Array:
  """Runs `score(first query, queries, keys) -> [B, queries, keys]` block by block."""
  length, keys = seen.query_positions.shape[1], seen.key_positions.shape[1]
  size = min(BLOCK, length)
  chosen = []
  stages = STAGES if ordered and length >= STAGES * size else 1
  edge = -(-length // (stages * size)) * size
  for first in range(0, length, edge):
    last = min(first + edge, length)
    stop = last if ordered else keys

    def block(number: jax.Array, first: int = first, last: int = last, stop: int = stop):
      # The last block is moved back to end with the row; what it repeats is the same.
      start = jnp.minimum(first + number * size, last - size)
      piece = lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=1)  # noqa: E731
      with jax.named_scope('indexer'):
        scores = score(start, size, stop)
      with jax.named_scope('select'):
        mask = visible(*seen.map(piece, lambda x: x[:, :stop]))
        found = take_largest(jnp.where(mask, scores, -jnp.inf), top_k)
        if counts is not None:
          taken = jnp.arange(found.shape[-1]) < counts[jnp.sum(mask, axis=-1)][..., None]
          found = jnp.where(taken, found, -1)
      return found

    blocks = -(-(last - first) // size)
    found = jnp.moveaxis(lax.map(block, jnp.arange(blocks)), 0, 1)
    sizes = found.shape[0], (blocks - 1) * size, found.shape[-1]
    whole = found[:, : blocks - 1].reshape(sizes)
    rest = (last - first) - (blocks - 1) * size
    found = jnp.concatenate([whole, found[:, -1, size - rest :]], axis=1)
    missing = top_k - found.shape[-1]
    chosen.append(jnp.pad(found, ((0, 0), (0, 0), (0, missing)), constant_values=-1))
  return jnp.concatenate(chosen, axis=1)
