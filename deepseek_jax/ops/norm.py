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


def swiglu(gate: jax.Array, up: jax.Array, *, limit: float | None = None) -> jax.Array:
  """Gates `up` [..., F] with silu(`gate`) [..., F], in the dtype of `up`.

  Args:
    gate: any float dtype.
    up: any float dtype.
    limit: largest gate, and largest magnitude of `up`, or None.

  Source: Shazeer, arXiv 2002.05202, equation 6; the limit: DeepSeek-V4, arXiv 2606.19348, its
    section on the stability of training.
  """
  # float32 inside: the sigmoid's tail is where bfloat16 is worst.
  gate32, up32 = gate.astype(jnp.float32), up.astype(jnp.float32)
  if limit is not None:
    gate32, up32 = jnp.minimum(gate32, limit), jnp.clip(up32, -limit, limit)
  return (jax.nn.silu(gate32) * up32).astype(up.dtype)


def layer_norm(
  x: jax.Array, scale: jax.Array, offset: jax.Array, epsilon: float = 1e-6
) -> jax.Array:
  """Takes the mean from a vector, divides it by its deviation, scales it and adds an offset.

  Args:
    x: [..., D].
    scale: [D] float32.
    offset: [D] float32.
    epsilon: added to the variance.

  Returns:
    [..., D] in the dtype of `x`; the statistics are float32.

  Source: Ba et al., arXiv 1607.06450, equation 3.
  """
  wide = x.astype(jnp.float32)
  wide -= jnp.mean(wide, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
  return (wide * jax.lax.rsqrt(variance + epsilon) * scale + offset).astype(x.dtype)
