"""Dropless expert layers: sort tokens by expert, multiply group by group, sum per token.

Where a device has parts of the matrices only, they are made whole for the forward pass and once
more for the gradient: kept in between, those of all layers would lie on every device.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.expert_loop import each_choice, loop_backward, loop_forward
from deepseek_jax.ops.expert_rows import (
  ExpertWeights,
  Layout,
  Products,
  combine,
  sort_by_expert,
  spread,
)
from deepseek_jax.ops.grouped_matmul import (
  grouped_gradients,
  grouped_products,
  grouped_weight_gradient,
)

Gather = Callable[[ExpertWeights], ExpertWeights]
"""Makes a device's parts of the matrices whole; differentiable."""


def as_they_are(matrices: ExpertWeights) -> ExpertWeights:
  """Returns matrices [E, D, F] that are whole."""
  return matrices


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def apply_experts(
  x: jax.Array,
  experts: jax.Array,
  weights: jax.Array,
  matrices: ExpertWeights,
  gather: Gather = as_they_are,
) -> jax.Array:
  """Runs every token through the experts it chose, and drops none.

  Args:
    x: [N, D] tokens.
    experts: [N, K] int32 chosen experts, from 0 to E; E is nobody, whose output is zero.
    weights: [N, K] float32 weights of the choices.
    matrices: SwiGLU weights of the E experts, in the dtype of `x`, or this device's parts of them.
    gather: makes the parts whole.

  Returns:
    [N, D] in the dtype of `x`: Σ_k weight_k · expert_k(x).

  Source: DeepSeekMoE, arXiv 2401.06066, equation 9.
  """
  whole = gather(matrices)

  def sorted_by_expert(*arguments):
    return forward_experts(*arguments)[0]

  if experts.size > len(whole.gate):
    return sorted_by_expert(x, experts, weights, whole)
  one_by_one = jax.named_scope('experts')(each_choice)
  return lax.platform_dependent(
    x, experts, weights, whole, cpu=one_by_one, default=sorted_by_expert
  )


def forward_experts(
  x: jax.Array, experts: jax.Array, weights: jax.Array, matrices: ExpertWeights
) -> tuple[jax.Array, tuple[Layout, Products]]:
  """Returns `apply_experts` [N, D] of the same arrays, and what its gradient needs of it."""
  with jax.named_scope('sort'):
    layout = sort_by_expert(experts, len(matrices.gate))

  def grouped(x, weights, layout, matrices):
    with jax.named_scope('spread'):
      rows = spread(x, layout)
    with jax.named_scope('experts'):
      out, products = forward_rows(rows, layout.sizes, matrices)
    with jax.named_scope('combine'):
      return combine(out, weights, layout), products

  # On a CPU the three products of a block are made one after the other, while it is in the cache.
  y, products = _by_platform(loop_forward, grouped)(x, weights, layout, matrices)
  return y, (layout, products)


def backward_experts(
  x: jax.Array,
  weights: jax.Array,
  matrices: ExpertWeights,
  saved: tuple[Layout, Products],
  grad: jax.Array,
) -> tuple[jax.Array, jax.Array, ExpertWeights]:
  """Gradients of `apply_experts`.

  Args:
    x: [N, D] tokens.
    weights: [N, K] float32.
    matrices: of the E experts.
    saved: what `forward_experts` returned.
    grad: [N, D] gradient of the result.

  Returns:
    Gradients of the tokens [N, D], of the weights [N, K] and of the matrices.
  """

  def grouped(x, weights, layout, products, matrices, grad):
    with jax.named_scope('spread'):
      rows, back = spread(x, layout), spread(grad, layout)
      factors = jnp.take(weights.reshape(-1), layout.pair)[:, None]
    with jax.named_scope('experts'):
      # The gradient of a row's weight needs the row's unweighted result; h · (back downᵀ) is its
      # product with `back`, without that result.
      hidden, pull = jax.vjp(matrices.gated, *products)
      (to_hidden,) = grouped_products(back, (matrices.down,), layout.sizes, transposed=True)
      weighed = to_hidden.astype(jnp.float32)
      d_weight = jnp.sum(hidden.astype(jnp.float32) * weighed, axis=1)
      d_rows, d_gate, d_up = grouped_gradients(
        rows,
        (matrices.gate, matrices.up),
        layout.sizes,
        pull((weighed * factors).astype(hidden.dtype)),
      )
      weighted = (hidden.astype(jnp.float32) * factors).astype(hidden.dtype)
      d_down = grouped_weight_gradient(weighted, back, layout.sizes)
    with jax.named_scope('combine'):
      grad_x = jnp.sum(jnp.take(d_rows, layout.row, axis=0), axis=1, dtype=jnp.float32)
    grad_weights = jnp.take(d_weight, layout.row).astype(weights.dtype)
    return grad_x.astype(x.dtype), grad_weights, matrices.of(d_gate, d_up, d_down)

  back = _by_platform(loop_backward, grouped)
  return back(x, weights, *saved, matrices, grad)


def _apply_forward(x, experts, weights, matrices, gather):
  y, saved = forward_experts(x, experts, weights, gather(matrices))
  return y, (x, weights, matrices, saved)


def _apply_backward(gather, kept, grad):
  x, weights, matrices, saved = kept
  whole, scatter = jax.vjp(gather, matrices)
  grad_x, grad_weights, grads = backward_experts(x, weights, whole, saved, grad)
  return grad_x, None, grad_weights, *scatter(grads)


apply_experts.defvjp(_apply_forward, _apply_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def apply_to_rows(
  rows: jax.Array, sizes: jax.Array, matrices: ExpertWeights, gather: Gather = as_they_are
) -> jax.Array:
  """Runs rows that are sorted already through their experts, without weights.

  Args:
    rows: [R, D], one expert's after the other's.
    sizes: [E] int32, rows of each expert; what comes after is nobody's.
    matrices: as of `apply_experts`.
    gather: makes the device's parts of them whole.

  Returns:
    [R, D] in the dtype of `rows`; zero on nobody's rows.
  """
  return forward_rows(rows, sizes, gather(matrices))[0]


def _rows_forward(rows, sizes, matrices, gather):
  out, products = forward_rows(rows, sizes, gather(matrices))
  return out, (rows, sizes, matrices, products)


def _rows_backward(gather, kept, grad):
  rows, sizes, matrices, products = kept
  whole, scatter = jax.vjp(gather, matrices)
  hidden, pull = jax.vjp(whole.gated, *products)
  (to_hidden,) = grouped_products(grad, (whole.down,), sizes, transposed=True)
  stacks = whole.gate, whole.up
  d_rows, d_gate, d_up = grouped_gradients(rows, stacks, sizes, pull(to_hidden))
  d_down = grouped_weight_gradient(hidden, grad, sizes)
  return d_rows, None, *scatter(whole.of(d_gate, d_up, d_down))


apply_to_rows.defvjp(_rows_forward, _rows_backward)


def forward_rows(
  rows: jax.Array, sizes: jax.Array, matrices: ExpertWeights
) -> tuple[jax.Array, Products]:
  """Returns `apply_to_rows` [R, D] of the same arrays, and what its gradient needs of it."""
  products = Products(*grouped_products(rows, (matrices.gate, matrices.up), sizes))
  return grouped_products(matrices.gated(*products), (matrices.down,), sizes)[0], products


def _by_platform(loop, default):
  def cpu(*arguments):
    with jax.named_scope('experts'):
      return loop(*arguments)

  return lambda *arguments: lax.platform_dependent(*arguments, cpu=cpu, default=default)


def apply_experts_reference(
  x: jax.Array, experts: jax.Array, weights: jax.Array, matrices: ExpertWeights
) -> jax.Array:
  """Slow and obvious twin of `apply_experts`: every token [N, D] through every expert."""
  gate = jnp.einsum('nd,edf->nef', x, matrices.gate)
  up = jnp.einsum('nd,edf->nef', x, matrices.up)
  every = jnp.einsum('nef,efd->ned', matrices.gated(gate, up), matrices.down)
  table = jnp.einsum(
    'nke,nk->ne', jax.nn.one_hot(experts, matrices.gate.shape[0], dtype=jnp.float32), weights
  )
  return jnp.einsum('ned,ne->nd', every, table).astype(x.dtype)
