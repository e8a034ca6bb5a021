"""Dropless expert layers: sort tokens by expert, multiply group by group, sum per token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.ops.expert_loop import loop_over_experts
from deepseek_jax.ops.expert_rows import combine, sort_by_expert, spread
from deepseek_jax.ops.grouped_matmul import grouped_matmul, grouped_swiglu
from deepseek_jax.ops.kernels.grouped_cpu import block_sizes
from deepseek_jax.ops.norm import swiglu


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
    with jax.named_scope('experts'):
      blocks = block_sizes(experts.size, count)
      return loop_over_experts(x, experts, weights, gate, up, down, blocks)

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
