"""Normalisation of activations."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float = 1e-6) -> jax.Array:
  """Divides each vector by its root mean square and multiplies it by a learned scale.

  Args:
    x: [..., D], any float dtype.
    scale: [D] float32.
    epsilon: added to the mean square.

  Returns:
    [..., D] in the dtype of `x`. The arithmetic is float32 and the scale is applied before the
    cast: squares of bfloat16 lose half of their digits.

  Source: Zhang & Sennrich, arXiv 1910.07467, equation 4.
  """
  x32 = x.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
  return (x32 * jax.lax.rsqrt(mean_square + epsilon) * scale.astype(jnp.float32)).astype(x.dtype)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """Gates `up` [..., F] with silu(`gate`) [..., F], in the dtype of `up`.

  Source: Shazeer, arXiv 2002.05202, equation 6.
  """
  # float32 inside: the sigmoid's tail is where bfloat16 is worst.
  gate32 = gate.astype(jnp.float32)
  return (jax.nn.silu(gate32) * up.astype(jnp.float32)).astype(up.dtype)
