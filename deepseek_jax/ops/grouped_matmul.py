"""Products of many matrices with the rows that belong to each: what experts are made of.

The rows of one expert follow those of the one before; `sizes` says how many each has. Rows after
the last expert's are nobody's: their results and gradients are zero.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.kernels import grouped_cpu, grouped_tpu
from deepseek_jax.ops.mesh import arrays_are_whole
from deepseek_jax.ops.norm import swiglu


@jax.custom_vjp
def grouped_matmul(tokens: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
  """Multiplies the rows of each expert with its matrix; sums are float32.

  Each platform has its own form: blocks in a loop on a CPU, Pallas kernels on a TPU,
  `jax.lax.ragged_dot` elsewhere; and on a TPU in float16, or where the compiler is left to
  partition the arrays, which it cannot do to a kernel.

  Args:
    tokens: [N, D] rows, one expert's after the other's.
    weights: [E, D, F] in the dtype of `tokens`.
    sizes: [E] int32, rows of each expert; they sum to N at most.

  Returns:
    [N, F] in the dtype of `tokens`.

  Source: Gale et al., MegaBlocks, arXiv 2211.15841, section 5.
  """
  return grouped_products(tokens, (weights,), sizes)[0]


def _matmul_forward(tokens, weights, sizes):
  return grouped_matmul(tokens, weights, sizes), (tokens, weights, sizes)


def _matmul_backward(saved, grad):
  tokens, weights, sizes = saved
  return *grouped_gradients(tokens, (weights,), sizes, (grad,)), None


grouped_matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def grouped_swiglu(
  tokens: jax.Array, gate: jax.Array, up: jax.Array, sizes: jax.Array
) -> jax.Array:
  """Gates what each expert's `up` makes of its rows with what its `gate` makes of them.

  Args:
    tokens: [N, D] rows, one expert's after the other's.
    gate: [E, D, F] in the dtype of `tokens`.
    up: [E, D, F].
    sizes: [E] int32, rows of each expert; they sum to N at most.

  Returns:
    [N, F] in the dtype of `tokens`.

  Source: Shazeer, arXiv 2002.05202, equation 6.
  """
  return swiglu(*grouped_products(tokens, (gate, up), sizes))


def _swiglu_forward(tokens, gate, up, sizes):
  products = grouped_products(tokens, (gate, up), sizes)
  return swiglu(*products), (tokens, gate, up, sizes, products)


def _swiglu_backward(saved, grad):
  tokens, gate, up, sizes, products = saved
  from_products = jax.vjp(swiglu, *products)[1](grad)
  return *grouped_gradients(tokens, (gate, up), sizes, from_products), None


grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def grouped_matmul_reference(tokens: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
  """Slow and obvious twin of `grouped_matmul`: every row [N, D] with every matrix [E, D, F]."""
  owner = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(tokens)), side='right')
  every = jnp.einsum('nd,edf->nef', tokens, weights, preferred_element_type=jnp.float32)
  own = jax.nn.one_hot(owner, len(sizes), dtype=jnp.float32)
  return jnp.einsum('nef,ne->nf', every, own).astype(tokens.dtype)


def grouped_products(
  tokens: jax.Array, weights: tuple[jax.Array, ...], sizes: jax.Array, *, transposed: bool = False
) -> tuple[jax.Array, ...]:
  """Multiplies rows with each of several stacks of matrices; has no gradient of its own.

  Args:
    tokens: [N, D] rows, one expert's after the other's.
    weights: stacks [E, D, F], or [E, F, D] transposed.
    sizes: [E] int32, rows of each expert.
    transposed: whether the matrices are.

  Returns:
    One array [N, F] for each stack, in the dtype of `tokens`; zero after the last expert's rows.
  """

  def tpu(tokens, sizes, *weights):
    product = functools.partial(grouped_tpu.multiply, transposed=transposed)
    return tuple(product(tokens, w, sizes) for w in weights)

  def cpu(tokens, sizes, *weights):
    return grouped_cpu.multiply(tokens, weights, sizes, transposed=transposed)

  def ragged(tokens, sizes, *weights):
    return tuple(
      lax.ragged_dot(tokens, jnp.swapaxes(w, 1, 2) if transposed else w, sizes) for w in weights
    )

  forms = {'cpu': cpu, 'tpu': tpu} if _kernel_fits(tokens) else {'cpu': cpu}
  return lax.platform_dependent(tokens, sizes, *weights, **forms, default=ragged)


def grouped_gradients(
  tokens: jax.Array,
  weights: tuple[jax.Array, ...],
  sizes: jax.Array,
  grads: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
  """Gradients of `grouped_products`.

  Args:
    tokens: [N, D] rows, one expert's after the other's.
    weights: stacks [E, D, F].
    sizes: [E] int32, rows of each expert.
    grads: [N, F] gradient of the product with each stack.

  Returns:
    The gradient of the rows [N, D], and of each stack [E, D, F], in the dtype of `tokens`.
  """
  back = (
    grouped_products(grad, (w,), sizes, transposed=True)[0].astype(jnp.float32)
    for grad, w in zip(grads, weights, strict=True)
  )
  stacks = (grouped_weight_gradient(tokens, grad, sizes) for grad in grads)
  return sum(back, jnp.float32(0)).astype(tokens.dtype), *stacks


def grouped_weight_gradient(tokens: jax.Array, grads: jax.Array, sizes: jax.Array) -> jax.Array:
  """Sums tokenᵀ · gradient over the rows of each expert, in float32.

  Args:
    tokens: [N, D].
    grads: [N, F].
    sizes: [E] int32.

  Returns:
    [E, D, F] in the dtype of `tokens`.
  """
  rows = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
  )
  forms = {'cpu': grouped_cpu.weight_gradient}
  if _kernel_fits(tokens):
    forms['tpu'] = grouped_tpu.weight_gradient
  ragged = functools.partial(lax.ragged_dot_general, ragged_dot_dimension_numbers=rows)
  return lax.platform_dependent(tokens, grads, sizes, **forms, default=ragged)


def _kernel_fits(tokens: jax.Array) -> bool:
  """Whether a TPU's kernel takes these rows: of its dtypes, and whole here."""
  return arrays_are_whole() and tokens.dtype in (jnp.bfloat16, jnp.float32)
