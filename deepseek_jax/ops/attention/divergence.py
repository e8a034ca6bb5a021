"""How far an indexer's scores are from the attention that they stand for, and what it missed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.attention.gathered import KeySets
from deepseek_jax.ops.attention.pieces import cut, joined
from deepseek_jax.ops.attention.reference import MASKED, Seen, visible
from deepseek_jax.ops.attention.select import index_scores

BLOCK = 64
"""Queries whose scores exist at once."""


def divergence(target: jax.Array, scores: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns KL(target || softmax(scores)) of each row, [...] float32.

  Args:
    target: [..., S] float32, not negative; it is divided by its sum here.
    scores: [..., S] float32.
    mask: [..., S] bool, what takes part.

  Source: DeepSeek-V3.2-Exp, equations 3 and 4.
  """
  target = jnp.where(mask, target, 0.0)
  target /= jnp.maximum(jnp.sum(target, axis=-1, keepdims=True), 1e-30)
  log = jax.nn.log_softmax(jnp.where(mask, scores, MASKED), axis=-1)
  # 0 · log 0 is 0, and its gradient must not become NaN.
  entropy = jnp.where(target > 0, target * jnp.log(jnp.where(target > 0, target, 1.0)), 0.0)
  return jnp.sum(entropy - jnp.where(mask, target * log, 0.0), axis=-1)


def selected_divergence(
  query: jax.Array,
  key: jax.Array,
  weights: jax.Array,
  sets: KeySets,
  mass: jax.Array,
) -> jax.Array:
  """Returns the indexer's KL of every query over the keys it attends to, [B, T] float32.

  Args:
    query: [B, T, J, d] index queries.
    key: [B, S, d] index keys.
    weights: [B, T, J] weight of each index head.
    sets: the keys that each query attends to.
    mass: [B, T, m] float32 attention to them, summed over heads.

  Source: DeepSeek-V3.2-Exp, equation 4.
  """
  length, (indices, block, seen) = query.shape[1], sets
  size = max(BLOCK // block, 1) * block
  hidden = None if seen is None else (seen.query_positions, seen.query_segments)
  # Cut before the loop, so that gradients are pieces too.
  pieces = (
    *(cut(x, size) for x in (query, weights, lax.stop_gradient(mass))),
    cut(indices, size // block, -1),
    jax.tree.map(lambda x: cut(x, size), hidden),
  )

  @jax.checkpoint
  def one(piece, key):
    query, weights, mass, found, hidden = piece
    safe = jnp.maximum(found, 0)
    rows = query.shape[0] * found.shape[1]

    def of_queries(x):
      return x.reshape(rows, block, *x.shape[2:])

    def of_keys(x):
      picked = jax.vmap(lambda x, i: x[i])(x, safe)
      return picked.reshape(rows, *picked.shape[2:])

    scores = index_scores(of_queries(query), of_keys(key), of_queries(weights))
    mask = (found >= 0).reshape(rows, 1, -1)
    if seen is not None:
      own = seen._replace(query_positions=hidden[0], query_segments=hidden[1])
      mask &= visible(*own.map(of_queries, of_keys))
    return divergence(of_queries(mass), scores, mask).reshape(query.shape[0], size)

  return joined(lax.map(lambda piece: one(piece, key), pieces), length)


def whole_divergence(
  attention: Callable[[jax.Array], jax.Array],
  query: jax.Array,
  key: jax.Array,
  weights: jax.Array,
  seen: Seen,
) -> jax.Array:
  """Returns the indexer's KL of every query over all keys it sees, [B, T] float32.

  Args:
    attention: rows [n] int32 -> [B, n, S] float32 attention of these queries, summed over heads.
    query: [B, T, J, d] index queries.
    key: [B, S, d] index keys.
    weights: [B, T, J] weight of each index head.
    seen: which key each query may see.

  Source: DeepSeek-V3.2-Exp, equation 3.
  """
  length = query.shape[1]
  size = min(BLOCK, length)
  numbers = jnp.minimum(jnp.arange(-(-length // size) * size), length - 1).reshape(-1, size)

  @jax.checkpoint
  def one(piece, key):
    query, weights, rows = piece
    target = lax.stop_gradient(attention(rows))
    return divergence(target, index_scores(query, key, weights), visible(*seen.at(rows)))

  pieces = (cut(query, size), cut(weights, size), numbers)
  return joined(lax.map(lambda piece: one(piece, key), pieces), length)


def membership(indices: jax.Array, keys: int) -> jax.Array:
  """Says which of S keys each list names, [B, n, S] bool; indices [B, n, m] int32, -1 is none."""
  slot = jnp.where(indices >= 0, indices, keys)
  none = jnp.zeros((*indices.shape[:2], keys + 1), bool)
  return jax.vmap(jax.vmap(lambda row, i: row.at[i].set(True)))(none, slot)[..., :keys]


def selection_quality(
  attention: jax.Array, chosen: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Says how good the chosen keys of some queries are.

  Args:
    attention: [B, n, S] float32 attention to every key, summed over heads.
    chosen: [B, n, S] bool, the keys that were chosen.
    mask: [B, n, S] bool, the keys that could have been.

  Returns:
    Recall [B, n]: share of the keys with the highest attention, as many as were chosen, that are
    among the chosen. Coverage [B, n]: share of the attention that goes to the chosen.
  """
  chosen &= mask
  attention = jnp.where(mask, attention, 0.0)
  count = jnp.sum(chosen, axis=-1)
  order = jnp.argsort(jnp.where(mask, attention, -1.0), axis=-1, descending=True)
  ranked = jnp.take_along_axis(chosen, order, axis=-1)
  best = jnp.arange(mask.shape[-1]) < count[..., None]
  recall = jnp.sum(ranked & best, axis=-1) / jnp.maximum(count, 1)
  total = jnp.maximum(jnp.sum(attention, axis=-1), 1e-30)
  return recall, jnp.sum(jnp.where(chosen, attention, 0.0), axis=-1) / total
