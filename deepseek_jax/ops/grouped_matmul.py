"""Matrix products of rows sorted by group, each group with a matrix of its own.

On TPU and GPU this is `jax.lax.ragged_dot`. XLA has no such kernel for CPU: there `ragged_dot`
multiplies every row with every matrix, so rows are cut in blocks that lie within one group, and a
loop multiplies each block in use with its matrix. Whoever sorts the rows picks the platform's form
with `jax.lax.platform_dependent`, since the CPU's wants groups that start at whole blocks.
"""

import functools

import jax
import jax.numpy as jnp


def grouped_matmul_reference(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  """Slow and obvious twin: every row with every matrix, then the right one is kept.

  Args:
    x: [R, D] rows sorted by group.
    w: [E, D, F] one matrix a group.
    sizes: [E] int32 rows in each group.

  Returns:
    [R, F] in the dtype of `x`; rows beyond the last group are zero.
  """
  ends = jnp.cumsum(sizes)
  row = jnp.arange(x.shape[0])[:, None]
  member = (row < ends) & (row >= ends - sizes)
  every = jnp.einsum('rd,edf->ref', x, w, preferred_element_type=jnp.float32)
  return jnp.einsum('ref,re->rf', every, member.astype(jnp.float32)).astype(x.dtype)


def grouped_matmul_ragged(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
  """`grouped_matmul_reference` as one kernel: x [R, D], w [E, D, F], sizes [E] -> [R, F]."""
  return jax.lax.ragged_dot(x, w, sizes)


def block_groups(sizes: jax.Array, block: int, blocks: int) -> tuple[jax.Array, jax.Array]:
  """Returns the group of every block [blocks] int32, and how many blocks are in use."""
  ends = jnp.cumsum(sizes) // block
  groups = jnp.searchsorted(ends, jnp.arange(blocks), side='right')
  return jnp.minimum(groups, sizes.shape[0] - 1).astype(jnp.int32), ends[-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul_blocks(x: jax.Array, w: jax.Array, sizes: jax.Array, block: int) -> jax.Array:
  """`grouped_matmul_reference` for CPU, `block` rows at a time.

  Args:
    x: [R, D] rows sorted by group; each group starts at a multiple of `block`.
    w: [E, D, F] one matrix a group, in the dtype of `x`.
    sizes: [E] int32 rows in each group, multiples of `block`; their sum is at most R.
    block: rows multiplied at once; divides R.

  Returns:
    [R, F] in the dtype of `x`; rows beyond the last group are zero.
  """
  return _multiply_blocks(x, w, sizes, block)


def _multiply_blocks(x: jax.Array, w: jax.Array, sizes: jax.Array, block: int) -> jax.Array:
  """One product a block; the loop stops after the last block in use."""
  blocks = x.shape[0] // block
  groups, used = block_groups(sizes, block, blocks)

  def body(i, out):
    rows = jax.lax.dynamic_slice_in_dim(x, i * block, block)
    matrix = jax.lax.dynamic_index_in_dim(w, groups[i], keepdims=False)
    product = jnp.dot(rows, matrix, preferred_element_type=jnp.float32).astype(x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(out, product, i * block, 0)

  return jax.lax.fori_loop(0, used, body, jnp.zeros((x.shape[0], w.shape[2]), x.dtype))


def _forward(x, w, sizes, block):
  return _multiply_blocks(x, w, sizes, block), (x, w, sizes)


def _backward(block, saved, grad):
  x, w, sizes = saved
  groups, used = block_groups(sizes, block, x.shape[0] // block)

  def body(i, carry):
    grad_x, grad_w = carry
    rows = jax.lax.dynamic_slice_in_dim(x, i * block, block)
    grad_rows = jax.lax.dynamic_slice_in_dim(grad, i * block, block)
    matrix = jax.lax.dynamic_index_in_dim(w, groups[i], keepdims=False)
    back = jax.lax.dot_general(
      grad_rows, matrix, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    grad_x = jax.lax.dynamic_update_slice_in_dim(grad_x, back.astype(x.dtype), i * block, 0)
    outer = jax.lax.dot_general(
      rows, grad_rows, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    # Sums over the blocks of a group stay float32 until the last one is in.
    return grad_x, grad_w.at[groups[i]].add(outer)

  start = (jnp.zeros_like(x), jnp.zeros(w.shape, jnp.float32))
  grad_x, grad_w = jax.lax.fori_loop(0, used, body, start)
  return grad_x, grad_w.astype(w.dtype), None


grouped_matmul_blocks.defvjp(_forward, _backward)
