"""Eight-bit integers with one scale a block of neighbouring channels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

LARGEST = 127
"""The integers go from -127 to 127; -128 is left out, so that the format is symmetric."""


class Int8Blocks(NamedTuple):
  """An array in a quarter of float32's memory.

  Attributes:
    values: [..., D] int8.
    scales: [..., ⌈D / block⌉] float32, one a block; the last block may be shorter.
  """

  values: jax.Array
  scales: jax.Array


def encode(x: jax.Array, block: int) -> Int8Blocks:
  """Rounds each block of the last axis to 255 even steps between ± its largest magnitude.

  The error of an element is at most half a step, 1 / 254 of the largest magnitude of its block.
  A block with an infinity or a NaN decodes to NaN: faults stay visible.

  Args:
    x: [..., D] floats.
    block: neighbouring channels that share a scale.
  """
  wide = x.astype(jnp.float32)
  blocks = _blocks(wide, block)
  scales = jnp.max(jnp.abs(blocks), axis=-1) / LARGEST
  # A block of zeros has no scale; dividing by any other number gives its zeros.
  divisor = jnp.where(scales == 0, 1.0, scales)[..., None]
  # The quotient may exceed 127 by a rounding error of the division.
  values = jnp.clip(jnp.round(blocks / divisor), -LARGEST, LARGEST).astype(jnp.int8)
  return Int8Blocks(values.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]], scales)


def decode(encoded: Int8Blocks, block: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
  """Returns the array [..., D] that `encode` rounded with this `block`."""
  blocks = _blocks(encoded.values.astype(jnp.float32), block) * encoded.scales[..., None]
  width = encoded.values.shape[-1]
  return blocks.reshape(*encoded.values.shape[:-1], -1)[..., :width].astype(dtype)


def _blocks(x: jax.Array, block: int) -> jax.Array:
  """Cuts the last axis of [..., D] into [..., ⌈D / block⌉, block], with zeros at the end."""
  short = -x.shape[-1] % block
  if short:
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
  return x.reshape(*x.shape[:-1], -1, block)
