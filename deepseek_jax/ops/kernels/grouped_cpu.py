"""Grouped products on a CPU: one loop over experts, one product for each block of their rows.

XLA has no grouped product for CPU: `jax.lax.ragged_dot` multiplies every row with every matrix
there. A product of few rows takes little less time than one of many, since the matrix has to be
laid out for it each time: so the rows of an expert are cut into blocks as large as an even share,
and the rest is one block more, which may reach beyond them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def block_sizes(rows: int, experts: int) -> tuple[int, ...]:
  """Chooses rows a block: about an expert's even share, half, a quarter and an eighth of it."""
  share = max(rows // experts, 1)
  largest = min(max(1 << (share.bit_length() - 1), 8), 512)
  return tuple(size for size in (largest, largest // 2, largest // 4, largest // 8) if size >= 8)


def blocks_within(rows: int, experts: int) -> tuple[int, ...]:
  """The block sizes, none of them larger than all there is."""
  return tuple(dict.fromkeys(min(size, rows) for size in block_sizes(rows, experts)))


def inside(start: jax.Array, size: int, end: jax.Array, total: int) -> tuple[jax.Array, jax.Array]:
  """Moves a block back to where it ends with the last row, so that nothing has to be padded.

  Args:
    start: [] int32, the block's first row.
    size: its rows.
    end: [] int32, the row after the expert's last.
    total: all rows.

  Returns:
    Where it starts, and which of its rows [size, 1] are its own: neither those before its old
    start nor those behind the expert's.
  """
  moved = jnp.minimum(start, total - size)
  row = moved + jnp.arange(size)
  return moved, ((row >= start) & (row < end))[:, None]


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """Multiplies matrices [I, J] and [J, K] over an axis of each, giving [I, K] float32."""
  return lax.dot_general(
    a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32
  )


def each_block(
  blocks: tuple[int, ...], start: jax.Array, stop: jax.Array, body: Callable[..., Any], carry: Any
) -> Any:
  """Runs `carry = body(first row, rows, carry)` until all rows of an expert are done.

  As many of the largest blocks as fit; then one of the smallest that holds the rest.

  Args:
    blocks: rows of a block, largest first.
    start: [] int32, the expert's first row.
    stop: [] int32, the row after its last.
    body: what is done to a block.
    carry: what `body` is given first.
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


def pick(array: jax.Array, index: jax.Array) -> jax.Array:
  """Returns one expert's matrix [D, F] of [E, D, F]."""
  return lax.dynamic_index_in_dim(array, index, keepdims=False)


def read(array: jax.Array, start: jax.Array, size: int) -> jax.Array:
  """Returns rows [size, …] of [R, …]."""
  return lax.dynamic_slice_in_dim(array, start, size)


def write(array: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
  """Returns [R, …] with rows replaced from `start` on."""
  return lax.dynamic_update_slice_in_dim(array, block.astype(array.dtype), start, 0)


def multiply(
  tokens: jax.Array, weights: tuple[jax.Array, ...], sizes: jax.Array, *, transposed: bool = False
) -> tuple[jax.Array, ...]:
  """Multiplies rows [N, D] with each of several stacks of matrices; each row is read once.

  Args:
    tokens: [N, D] rows, one expert's after the other's.
    weights: stacks [E, D, F], or [E, F, D] transposed.
    sizes: [E] int32, rows of each expert.
    transposed: whether the matrices are.

  Returns:
    One array [N, F] for each stack, in the dtype of `tokens`; zero after the last expert's rows.
  """
  count, total = len(sizes), tokens.shape[0]
  blocks, ends = blocks_within(total, count), jnp.cumsum(sizes)

  def expert(e, carry):
    # The barrier keeps the compiler from folding the transposition back into the products, which
    # then would read columns.
    own = [pick(w, e).T if transposed else pick(w, e) for w in weights]
    own = lax.optimization_barrier(own)
    first = ends[e] - sizes[e]

    def block(start, size, carry):
      start, mine = inside(start, size, ends[e], total)
      rows = read(tokens, start, size)
      found = (dot(rows, w, (1, 0)).astype(tokens.dtype) for w in own)
      return tuple(
        write(out, jnp.where(mine, new, read(out, start, size)), start)
        for out, new in zip(carry, found)
      )

    return each_block(blocks, first, ends[e], block, carry)

  axis = 1 if transposed else 2
  empty = tuple(jnp.zeros((total, w.shape[axis]), tokens.dtype) for w in weights)
  return lax.fori_loop(0, count, expert, empty)


def weight_gradient(tokens: jax.Array, grads: jax.Array, sizes: jax.Array) -> jax.Array:
  """Sums tokenᵀ · gradient over the rows of each expert, in float32.

  Args:
    tokens: [N, D].
    grads: [N, F].
    sizes: [E] int32.

  Returns:
    [E, D, F] in the dtype of `tokens`.
  """
  count, total = len(sizes), tokens.shape[0]
  blocks, ends = blocks_within(total, count), jnp.cumsum(sizes)

  def expert(e, out):
    first = ends[e] - sizes[e]

    def block(start, size, sums):
      start, mine = inside(start, size, ends[e], total)
      back = jnp.where(mine, read(grads, start, size), 0)
      return sums + dot(read(tokens, start, size), back, (0, 0))

    zeros = jnp.zeros(out.shape[1:], jnp.float32)
    sums = each_block(blocks, first, ends[e], block, zeros)
    return lax.dynamic_update_index_in_dim(out, sums.astype(out.dtype), e, 0)

  shape = (count, tokens.shape[1], grads.shape[1])
  return lax.fori_loop(0, count, expert, jnp.zeros(shape, tokens.dtype))
