"""Rows of tokens cut into pieces that a loop takes one after the other, and joined again."""

import jax
import jax.numpy as jnp


def padded(x: jax.Array, length: int, fill: int = 0) -> jax.Array:
  """Lengthens `x` [B, T, …] to `length` with a constant."""
  widths = [(0, 0)] * x.ndim
  widths[1] = (0, length - x.shape[1])
  return jnp.pad(x, widths, constant_values=fill) if widths[1][1] else x


def cut(x: jax.Array, size: int, fill: int = 0, count: int | None = None) -> jax.Array:
  """[B, T, …] -> [pieces, B, size, …], filled up; `count` of them, or as many as needed."""
  count = -(-x.shape[1] // size) if count is None else count
  x = padded(x, count * size, fill)
  return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)


def joined(x: jax.Array, length: int | None = None) -> jax.Array:
  """[pieces, B, size, …] -> [B, T, …]: the inverse of `cut`; None keeps what it added."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])[:, :length]
