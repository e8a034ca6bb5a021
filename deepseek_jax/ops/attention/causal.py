"""Causal attention in blocks of queries: fewer products, and no weights kept for the gradient.

A token never sees a later one of its row, so a block of queries needs the keys up to its own end
only. The gradient makes the softmax weights again from the logarithm of their sum.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from deepseek_jax.ops.attention.reference import MASKED

BLOCKS = 4
"""Blocks a row is cut into: the products shrink to (1 + 1 / BLOCKS) / 2, compilation grows."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_causal(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, scale: float
) -> jax.Array:
  """`reference.attend` of a row's tokens to the row itself, every head with keys of its own.

  Args:
    query: [B, T, H, K].
    key: [B, T, H, K].
    value: [B, T, H, V].
    mask: [B, T, T] bool, True where a query may see a key; what it says of keys that come after
      the query is not looked at, or that they are hidden is taken for granted.
    scale: factor on the scores.

  Returns:
    [B, T, H, V] in the dtype of `value`. Scores and softmax are float32.

  Source: Vaswani et al., arXiv 1706.03762, equation 1; weights made twice: Dao et al.,
    arXiv 2205.14135, section 3.1.
  """
  return _forward(query, key, value, mask, scale)[0]


def _blocks(length: int) -> Iterator[slice]:
  """Yields the rows of each block of queries, of 8 tokens or more."""
  size = max(-(-length // BLOCKS), 8)
  for start in range(0, length, size):
    yield slice(start, min(start + size, length))


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _heads_first(x: jax.Array) -> jax.Array:
  """[B, T, H, K] <-> [B, H, T, K]; the products of a head lie together in memory."""
  return jnp.swapaxes(x, 1, 2)


def _forward(query, key, value, mask, scale):
  q, k, v = map(_heads_first, (query, key, value))
  outs, log_sums = [], []
  for rows in _blocks(q.shape[2]):
    scores = _product('bhtk,bhsk->bhts', q[:, :, rows], k[:, :, : rows.stop]) * scale
    scores = jnp.where(mask[:, None, rows, : rows.stop], scores, MASKED)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _product('bhts,bhsv->bhtv', weights.astype(v.dtype), v[:, :, : rows.stop])
    outs.append((out / total).astype(v.dtype))
    log_sums.append(top + jnp.log(total))
  out = jnp.concatenate(outs, axis=2)
  return _heads_first(out), (q, k, v, mask, out, jnp.concatenate(log_sums, axis=2))


def _backward(scale, saved, grad):
  q, k, v, mask, out, log_sum = saved
  grad = _heads_first(grad)
  # Σ_s weight_s · ∂loss/∂weight_s of every query: what the softmax subtracts.
  drift = jnp.sum(out.astype(jnp.float32) * grad.astype(jnp.float32), axis=-1, keepdims=True)
  grad_q = []
  grad_k, grad_v = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
  for rows in _blocks(q.shape[2]):
    seen = slice(0, rows.stop)
    # Keys first, queries second: of the three products to come, two then read rows in order.
    scores = _product('bhsk,bhtk->bhst', k[:, :, seen], q[:, :, rows]) * scale
    hidden = ~jnp.swapaxes(mask[:, None, rows, seen], 2, 3)
    weights = jnp.where(hidden, 0.0, jnp.exp(scores - jnp.swapaxes(log_sum[:, :, rows], 2, 3)))
    back = _product('bhsv,bhtv->bhst', v[:, :, seen], grad[:, :, rows])
    grad_scores = weights * (back - jnp.swapaxes(drift[:, :, rows], 2, 3)) * scale
    grad_scores = grad_scores.astype(q.dtype)
    grad_q.append(_product('bhst,bhsk->bhtk', grad_scores, k[:, :, seen]).astype(q.dtype))
    part = _product('bhst,bhtk->bhsk', grad_scores, q[:, :, rows])
    grad_k = grad_k.at[:, :, seen].add(part)
    part = _product('bhst,bhtv->bhsv', weights.astype(v.dtype), grad[:, :, rows])
    grad_v = grad_v.at[:, :, seen].add(part)
  grads = (jnp.concatenate(grad_q, axis=2), grad_k.astype(k.dtype), grad_v.astype(v.dtype))
  return *map(_heads_first, grads), None


attend_causal.defvjp(_forward, _backward)
