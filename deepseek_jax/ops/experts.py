"""Dropless expert layers: sort tokens by expert, multiply group by group, sum per token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.ops.expert_loop import Layout, loop_over_experts
from deepseek_jax.ops.grouped_matmul import grouped_matmul, grouped_swiglu
from deepseek_jax.ops.kernels.grouped_cpu import block_sizes
from deepseek_jax.ops.norm import swiglu


def sort_by_expert(experts: jax.Array, count: int, padding: int = 0) -> Layout:
  """Gives every (token, choice) pair a row, so that each expert has a run of rows.

  Args:
    experts: [N, K] int32; `count` is nobody. Those rows come last and are nobody's.
    count: number of experts E.
    padding: rows without a pair after the last expert's.
  """
  tokens, top_k = experts.shape
  pairs = tokens * top_k
  flat = experts.reshape(-1)
  order = jnp.argsort(flat, stable=True).astype(jnp.int32)
  sizes = jnp.zeros(count, jnp.int32).at[flat].add(1)
  row = jnp.zeros(pairs, jnp.int32).at[order].set(jnp.arange(pairs), unique_indices=True)
  pair = jnp.pad(order, (0, padding), constant_values=pairs)
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
    experts: [N, K] int32 chosen experts, from 0 to E; E is nobody, whose output is zero.
    weights: [N, K] float32 weights of the choices.
    matrices: SwiGLU weights of the E experts, in the dtype of `x`.

  Returns:
    [N, D] in the dtype of `x`: Σ_k weight_k · expert_k(x).

  Source: DeepSeekMoE, arXiv 2401.06066, equation 9.
  """
  count = matrices.gate.shape[0]

  def looped(x, experts, weights, gate, up, down):
    blocks = block_sizes(experts.size, count)
    layout = sort_by_expert(experts, count, padding=blocks[0])
    with jax.named_scope('experts'):
      return loop_over_experts(x, weights, layout, gate, up, down, blocks)

  def grouped(x, experts, weights, gate, up, down):
    layout = sort_by_expert(experts, count)
    with jax.named_scope('spread'):
      rows = spread(x, layout)
    with jax.named_scope('experts'):
      hidden = grouped_swiglu(rows, gate, up, layout.sizes)
      rows = grouped_matmul(hidden, down, layout.sizes)
    with jax.named_scope('combine'):
      return combine(rows, weights, layout)

  # On a CPU the three products of a block are made one after the other, while it is in the cache.
  return jax.lax.platform_dependent(x, experts, weights, *matrices, cpu=looped, default=grouped)


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
