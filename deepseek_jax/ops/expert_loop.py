"""SwiGLU experts on a CPU: one loop over experts, one product for each block of their rows.

XLA has no grouped product for CPU, and `jax.lax.ragged_dot` multiplies every row with every matrix
there. A product of few rows takes little less time than one of many, since the matrix has to be
laid out for it each time: so the rows of an expert are cut into blocks as large as an even share,
and the rest is one block more, which may reach into the next expert's rows. What is written there
is written again when that expert's turn comes. Everything that happens to a block happens while it
is in the cache, and the gradient is a loop of its own: kept for it are the products of gate and up.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.norm import swiglu


class Layout(NamedTuple):
  """Where each (token, choice) pair lies among the rows sorted by expert.

  Attributes:
    pair: [R] int32, the flat index n · K + k of the pair in each row; N · K marks padding.
    row: [N, K] int32, the row of each pair.
    sizes: [E] int32, rows of each expert, padding included.
  """

  pair: jax.Array
  row: jax.Array
  sizes: jax.Array


def block_sizes(pairs: int, experts: int) -> tuple[int, ...]:
  """Chooses rows a block: about an expert's even share, half, a quarter and an eighth of it."""
  share = max(pairs // experts, 1)
  largest = min(max(1 << (share.bit_length() - 1), 8), 512)
  return tuple(size for size in (largest, largest // 2, largest // 4, largest // 8) if size >= 8)


def _product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """Multiplies two matrices over one axis of each; sums are float32."""
  return lax.dot_general(
    a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32
  )


def _each_block(
  blocks: tuple[int, ...], start: jax.Array, stop: jax.Array, body: Callable[..., Any], carry: Any
) -> Any:
  """Runs `body(first row, rows, carry)` until rows [start, stop) are done.

  As many of the largest blocks as fit; then one of the smallest that holds the rest.
  """
  whole, rest = (stop - start) // blocks[0], (stop - start) % blocks[0]
  at = start
  for size, smaller in zip(blocks, (*blocks[1:], 0), strict=True):
    count = ((rest > smaller) & (rest <= size)).astype(jnp.int32)
    if size == blocks[0]:
      count += whole
    carry = lax.fori_loop(0, count, functools.partial(_at, body, at, size), carry)
    at = start + whole * blocks[0]
  return carry


def _at(body, start, size, i, carry):
  return body(start + i * size, size, carry)


def _pick(array: jax.Array, index: jax.Array) -> jax.Array:
  return lax.dynamic_index_in_dim(array, index, keepdims=False)


def _read(array: jax.Array, start: jax.Array, size: int) -> jax.Array:
  return lax.dynamic_slice_in_dim(array, start, size)


def _write(array: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
  return lax.dynamic_update_slice_in_dim(array, block.astype(array.dtype), start, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def loop_over_experts(
  x: jax.Array,
  weights: jax.Array,
  layout: Layout,
  gate: jax.Array,
  up: jax.Array,
  down: jax.Array,
  blocks: tuple[int, ...],
) -> jax.Array:
  """Runs every token through its experts and sums what they say, with weights.

  Args:
    x: [N, D] tokens.
    weights: [N, K] float32 weights of the choices.
    layout: the rows of every expert, one expert's after the other's; at least `blocks[0]` rows of
      padding follow.
    gate: [E, D, F] in the dtype of `x`.
    up: [E, D, F].
    down: [E, F, D].
    blocks: rows multiplied at once, largest first.

  Returns:
    [N, D] in the dtype of `x`.

  Source: DeepSeekMoE, arXiv 2401.06066, equation 9; SwiGLU: Shazeer, arXiv 2002.05202.
  """
  return _forward(x, weights, layout, gate, up, down, blocks)[0]


def _row_facts(weights: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the token and the weight (0 on padding) of every row [R], and each expert's end [E]."""
  tokens, top_k = weights.shape
  token = jnp.minimum(layout.pair // top_k, tokens - 1)
  weight = jnp.take(weights.reshape(-1), layout.pair, mode='fill', fill_value=0)
  return token, weight, jnp.cumsum(layout.sizes)


def _forward(x, weights, layout, gate, up, down, blocks):
  token, weight, ends = _row_facts(weights, layout)

  def expert(e, carry):
    w_gate, w_up, w_down = (_pick(w, e) for w in (gate, up, down))

    def block(start, size, carry):
      out, gates, ups = carry
      tokens = x[_read(token, start, size)]
      g, u = (_product(tokens, w, (1, 0)).astype(x.dtype) for w in (w_gate, w_up))
      result = _product(swiglu(g, u), w_down, (1, 0)) * _read(weight, start, size)[:, None]
      return _write(out, result, start), _write(gates, g, start), _write(ups, u, start)

    return _each_block(blocks, ends[e] - layout.sizes[e], ends[e], block, carry)

  rows, (count, width, hidden) = token.shape[0], gate.shape
  sizes = ((rows, width), (rows, hidden), (rows, hidden))
  start = tuple(jnp.zeros(size, x.dtype) for size in sizes)
  out, gates, ups = lax.fori_loop(0, count, expert, start)
  total = _sum_choices(out, layout)
  return total, (x, weights, layout, gate, up, down, gates, ups)


def _backward(blocks, saved, grad):
  x, weights, layout, gate, up, down, gates, ups = saved
  token, weight, ends = _row_facts(weights, layout)

  def expert(e, carry):
    grad_rows, grad_weight, *grads = carry
    w_gate, w_up, w_down = (_pick(w, e) for w in (gate, up, down))

    def block(start, size, carry):
      grad_rows, grad_weight, d_gate, d_up, d_down = carry
      picked, factor = _read(token, start, size), _read(weight, start, size)[:, None]
      own = (start + jnp.arange(size) < ends[e])[:, None]
      tokens, back = x[picked], grad[picked]
      hidden, pull = jax.vjp(swiglu, _read(gates, start, size), _read(ups, start, size))
      # The gradient of a weight needs the row's unweighted result; h · (back downᵀ) is its product
      # with `back`, without that result.
      to_hidden = _product(back, w_down, (1, 1))
      d_weight = jnp.sum(hidden.astype(jnp.float32) * to_hidden, axis=1)
      d_g, d_u = pull(jnp.where(own, to_hidden * factor, 0).astype(x.dtype))
      weighted = jnp.where(own, hidden.astype(jnp.float32) * factor, 0).astype(x.dtype)
      d_tokens = _product(d_g, w_gate, (1, 1)) + _product(d_u, w_up, (1, 1))
      return (
        _write(grad_rows, d_tokens, start),
        _write(grad_weight, d_weight, start),
        d_gate + _product(tokens, d_g, (0, 0)),
        d_up + _product(tokens, d_u, (0, 0)),
        d_down + _product(weighted, back, (0, 0)),
      )

    # Sums over the blocks of an expert stay float32 until the last one is in.
    sums = [jnp.zeros(w.shape, jnp.float32) for w in (w_gate, w_up, w_down)]
    first = ends[e] - layout.sizes[e]
    start = (grad_rows, grad_weight, *sums)
    grad_rows, grad_weight, *sums = _each_block(blocks, first, ends[e], block, start)
    grads = [
      lax.dynamic_update_index_in_dim(whole, part.astype(whole.dtype), e, 0)
      for whole, part in zip(grads, sums, strict=True)
    ]
    return grad_rows, grad_weight, *grads

  rows = token.shape[0]
  empty = [jnp.zeros_like(w) for w in (gate, up, down)]
  start = (jnp.zeros((rows, x.shape[1]), x.dtype), jnp.zeros(rows, jnp.float32), *empty)
  grad_rows, grad_weight, *grads = lax.fori_loop(0, gate.shape[0], expert, start)
  grad_weights = grad_weight[layout.row].astype(weights.dtype)
  return _sum_choices(grad_rows, layout), grad_weights, None, *grads


def _sum_choices(rows: jax.Array, layout: Layout) -> jax.Array:
  """Sums the K rows of each token, in float32: the order of the experts must not show.

  A gather, forward and backward: XLA's scatter is slow.
  """
  picked = jnp.take(rows, layout.row, axis=0)
  return jnp.sum(picked, axis=1, dtype=jnp.float32).astype(rows.dtype)


loop_over_experts.defvjp(_forward, _backward)
