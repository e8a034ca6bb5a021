"""Dropless expert layers: sort tokens by expert, multiply group by group, sum per token."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.ops.grouped_matmul import grouped_matmul_blocks, grouped_matmul_ragged
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


def block_rows(pairs: int, experts: int) -> int:
  """Chooses rows per block: about half an expert's even share, a power of two in [8, 128]."""
  share = max(pairs // (2 * experts), 1)
  return min(max(1 << (share.bit_length() - 1), 8), 128)


def sort_by_expert(experts: jax.Array, count: int, block: int) -> Layout:
  """Gives every (token, choice) pair a row, so that each expert has a run of whole blocks.

  No pair is dropped: the number of rows is the worst case over all loads.

  Args:
    experts: [N, K] int32.
    count: number of experts E.
    block: rows per block.
  """
  tokens, top_k = experts.shape
  pairs = tokens * top_k
  blocks = (pairs + (block - 1) * min(count, pairs)) // block
  flat = experts.reshape(-1)
  order = jnp.argsort(flat, stable=True)
  loads = jnp.zeros(count, jnp.int32).at[flat].add(1)
  sizes = (loads + block - 1) // block * block
  shift = (jnp.cumsum(sizes) - sizes) - (jnp.cumsum(loads) - loads)
  rows_in_order = jnp.arange(pairs, dtype=jnp.int32) + shift[flat[order]]
  row = jnp.zeros(pairs, jnp.int32).at[order].set(rows_in_order, unique_indices=True)
  pair = jnp.full(blocks * block, pairs, jnp.int32)
  pair = pair.at[rows_in_order].set(order.astype(jnp.int32), unique_indices=True)
  return Layout(pair, row.reshape(tokens, top_k), sizes)


@jax.custom_vjp
def spread(x: jax.Array, layout: Layout) -> jax.Array:
  """Copies tokens [N, D] to their rows [R, D]; padding rows are zero.

  The gradient is a gather too (each token sums its K rows): XLA's scatter is slow.
  """
  source = layout.pair // layout.row.shape[1]
  return jnp.take(x, source, axis=0, mode='fill', fill_value=0)


def _spread_forward(x, layout):
  return spread(x, layout), layout


def _spread_backward(layout, grad):
  rows = jnp.take(grad, layout.row, axis=0)
  return jnp.sum(rows.astype(jnp.float32), axis=1).astype(grad.dtype), None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def combine(rows: jax.Array, weights: jax.Array, layout: Layout) -> jax.Array:
  """Sums for each token its K rows [R, D] with weights [N, K] float32, giving [N, D].

  The sum is float32: the order in which experts are added must not show.
  """
  picked = jnp.take(rows, layout.row, axis=0)
  total = jnp.einsum('nkd,nk->nd', picked, weights, preferred_element_type=jnp.float32)
  return total.astype(rows.dtype)


def _combine_forward(rows, weights, layout):
  return combine(rows, weights, layout), (rows, weights, layout)


def _combine_backward(saved, grad):
  rows, weights, layout = saved
  top_k = weights.shape[1]
  weight = jnp.take(weights.reshape(-1), layout.pair, mode='fill', fill_value=0)
  back = jnp.take(grad, layout.pair // top_k, axis=0, mode='fill', fill_value=0)
  grad_rows = (back.astype(jnp.float32) * weight[:, None]).astype(rows.dtype)
  picked = jnp.take(rows, layout.row, axis=0)
  grad_weights = jnp.einsum('nkd,nd->nk', picked, grad, preferred_element_type=jnp.float32)
  return grad_rows, grad_weights.astype(weights.dtype), None


combine.defvjp(_combine_forward, _combine_backward)


class ExpertWeights(NamedTuple):
  """SwiGLU weights of all experts: gate and up [E, D, F], down [E, F, D]."""

  gate: jax.Array
  up: jax.Array
  down: jax.Array


def apply_experts(
  x: jax.Array, experts: jax.Array, weights: jax.Array, matrices: ExpertWeights
) -> jax.Array:
  """Runs every token through the experts it chose, and drops none.

  Args:
    x: [N, D] tokens.
    experts: [N, K] int32 chosen experts.
    weights: [N, K] float32 weights of the choices.
    matrices: SwiGLU weights of the E experts, in the dtype of `x`.

  Returns:
    [N, D] in the dtype of `x`: Σ_k weight_k · expert_k(x).

  Source: DeepSeekMoE, arXiv 2401.06066, equation 9.
  """
  count = matrices.gate.shape[0]

  def run(block, multiply, x, experts, weights, gate, up, down):
    layout = sort_by_expert(experts, count, block)
    with jax.named_scope('spread'):
      rows = spread(x, layout)
    with jax.named_scope('experts'):
      hidden = swiglu(multiply(rows, gate, layout.sizes), multiply(rows, up, layout.sizes))
      rows = multiply(hidden, down, layout.sizes)
    with jax.named_scope('combine'):
      return combine(rows, weights, layout)

  # Only the CPU's loop over blocks needs groups that start at whole blocks.
  block = block_rows(experts.size, count)
  by_blocks = functools.partial(run, block, functools.partial(grouped_matmul_blocks, block=block))
  ragged = functools.partial(run, 1, grouped_matmul_ragged)
  return jax.lax.platform_dependent(x, experts, weights, *matrices, cpu=by_blocks, default=ragged)


def apply_experts_reference(
  x: jax.Array, experts: jax.Array, weights: jax.Array, matrices: ExpertWeights
) -> jax.Array:
  """Slow and obvious twin of `apply_experts`: every token [N, D] through every expert."""
  gate = jnp.einsum('nd,edf->nef', x, matrices.gate)
  up = jnp.einsum('nd,edf->nef', x, matrices.up)
  every = jnp.einsum('nef,efd->ned', swiglu(gate, up), matrices.down)
  table = jnp.einsum(
    'nke,nk->ne', jax.nn.one_hot(experts, matrices.gate.shape[0], dtype=jnp.float32), weights
  )
  return jnp.einsum('ned,ne->nd', every, table).astype(x.dtype)
