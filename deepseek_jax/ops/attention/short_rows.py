"""Attention of short rows: blocks of queries only, all rows and heads of a block at once.

A token never sees a later one of its row, so a block of queries needs the keys up to its own end
only. The gradient makes the softmax weights again from the logarithm of their sum. The loop is
unrolled: the scores of a block are held whole, which is faster than a running softmax as long as
they are not too many.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from deepseek_jax.ops.attention.blocks import FLOOR, Back, Extras, Static
from deepseek_jax.ops.attention.reference import MASKED, Seen, visible, window_mask

BLOCKS = 4
"""Blocks a row is cut into: the products shrink to (1 + 1 / BLOCKS) / 2, compilation grows."""


def forward(
  query: jax.Array, key: jax.Array, value: jax.Array, extras: Extras, seen: Seen, static: Static
) -> tuple[jax.Array, jax.Array]:
  """Returns what `long_rows.forward` does: outputs [B, T, H, V], log-sums [B, T, H]."""
  k, v = _heads_first(key), _heads_first(value)
  q = _shared(_heads_first(query), k.shape[1])
  outs, log_sums = [], []
  for rows, keys in _blocks(query.shape[1], key.shape[1], static.in_order):
    scores = _product('bgrtk,bgsk->bgrts', q[:, :, :, rows], k[:, :, keys]) * static.scale
    if extras.key_bias is not None:
      scores += extras.key_bias[:, None, None, None, keys]
    scores = jnp.where(_mask(seen, rows, keys, static)[:, None, None], scores, MASKED)
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), FLOOR)
    if extras.sinks is not None:
      sinks = extras.sinks.astype(jnp.float32).reshape(*q.shape[1:3], 1, 1)
      top = jnp.maximum(top, sinks)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if extras.sinks is not None:
      total += jnp.exp(sinks - top)
    out = _product('bgrts,bgsv->bgrtv', weights.astype(v.dtype), v[:, :, keys])
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    outs.append((out / total).astype(v.dtype))
    log_sums.append(jnp.where(empty, FLOOR, top + jnp.log(total)))
  out, log_sum = (_heads_last(jnp.concatenate(x, axis=3)) for x in (outs, log_sums))
  return out, log_sum[..., 0]


def backward(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  extras: Extras,
  seen: Seen,
  static: Static,
  back: Back,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
  """Returns what `long_rows.backward` does: gradients [B, T, H, K] and so on."""
  k, v = _heads_first(key), _heads_first(value)
  q, g = (_shared(_heads_first(x), k.shape[1]) for x in (query, back.grad.astype(value.dtype)))
  log_sum, drift = (
    jnp.swapaxes(_shared(_heads_first(x[..., None]), k.shape[1]), 3, 4) for x in back[:2]
  )
  grad_q = []
  grad_k, grad_v = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
  bias = None if extras.key_bias is None else jnp.zeros(extras.key_bias.shape, jnp.float32)
  for rows, keys in _blocks(query.shape[1], key.shape[1], static.in_order):
    # Keys first, queries second: of the three products to come, two then read rows in order.
    scores = _product('bgsk,bgrtk->bgrst', k[:, :, keys], q[:, :, :, rows]) * static.scale
    if extras.key_bias is not None:
      scores += extras.key_bias[:, None, None, keys, None]
    shown = jnp.swapaxes(_mask(seen, rows, keys, static), 1, 2)[:, None, None]
    weights = jnp.where(shown, jnp.exp(scores - log_sum[..., rows]), 0.0)
    change = _product('bgsv,bgrtv->bgrst', v[:, :, keys], g[:, :, :, rows])
    change = weights * (change - drift[..., rows])
    if bias is not None:
      bias = bias.at[:, keys].add(jnp.sum(change, axis=(1, 2, 4)))
    change = (change * static.scale).astype(q.dtype)
    grad_q.append(_product('bgrst,bgsk->bgrtk', change, k[:, :, keys]).astype(q.dtype))
    part = _product('bgrst,bgrtk->bgsk', change, q[:, :, :, rows])
    grad_k = grad_k.at[:, :, keys].add(part)
    part = _product('bgrst,bgrtv->bgsv', weights.astype(v.dtype), g[:, :, :, rows])
    grad_v = grad_v.at[:, :, keys].add(part)
  grad_k, grad_v = (_heads_first(x.astype(key.dtype)) for x in (grad_k, grad_v))
  return _heads_last(jnp.concatenate(grad_q, axis=3)), grad_k, grad_v, bias


def _blocks(queries: int, keys: int, in_order: bool) -> Iterator[tuple[slice, slice]]:
  """Yields the rows of each block of queries, of 8 tokens or more, and the keys it needs."""
  size = max(-(-queries // BLOCKS), 8)
  for start in range(0, queries, size):
    stop = min(start + size, queries)
    yield slice(start, stop), slice(0, stop if in_order else keys)


def _mask(seen: Seen, rows: slice, keys: slice, static: Static) -> jax.Array:
  """Says which of some keys some queries see, [B, T, S] of theirs alone."""
  part = seen.map(lambda x: x[:, rows], lambda x: x[:, keys])
  mask = visible(*part)
  if static.window is not None:
    mask &= window_mask(part.query_positions, part.key_positions, *static.window)
  return mask


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _heads_first(x: jax.Array) -> jax.Array:
  """[B, T, H, K] <-> [B, H, T, K]; the products of a head lie together in memory."""
  return jnp.swapaxes(x, 1, 2)


def _shared(x: jax.Array, groups: int) -> jax.Array:
  """[B, H, T, K] -> [B, G, H / G, T, K]."""
  return x.reshape(x.shape[0], groups, -1, *x.shape[2:])


def _heads_last(x: jax.Array) -> jax.Array:
  """[B, G, H / G, T, K] -> [B, T, H, K]."""
  return _heads_first(x.reshape(x.shape[0], -1, *x.shape[3:]))
