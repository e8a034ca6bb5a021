"""Scales that are powers of two: one byte each (E8M0), and exact to multiply by."""

import jax
import jax.numpy as jnp


def ceil_power_of_two(x: jax.Array) -> jax.Array:
  """Returns the least power of two at or above each of `x`, positive float32.

  By the bits of the number, not by a logarithm, which may round to the wrong side. An infinity or a
  NaN becomes NaN.
  """
  mantissa, exponent = jnp.frexp(x.astype(jnp.float32))
  # A mantissa is at least a half: a half alone is a power of two itself.
  exponent -= (mantissa == 0.5).astype(exponent.dtype)
  return jnp.where(jnp.isfinite(x), jnp.ldexp(jnp.float32(1), exponent), jnp.nan)
