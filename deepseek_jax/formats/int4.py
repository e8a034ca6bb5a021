"""Four-bit integers, two to a byte, with one scale a block of neighbouring channels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

LARGEST = 7
"""The integers go from -7 to 7; -8 is left out, so that the format is symmetric."""


class Int4Blocks(NamedTuple):
  """An array in an eighth of float32's memory.

  Attributes:
    values: [..., D / 2] uint8, two integers a byte, the first in the low four bits, each as its
      two's complement.
    scales: [..., D / block] float32, one a block.
  """

  values: jax.Array
  scales: jax.Array


def encode(x: jax.Array, block: int) -> Int4Blocks:
  """Rounds each block of the last axis to 15 even steps between ± its largest magnitude.

  The error of an element is at most half a step, 1 / 14 of the largest magnitude of its block. A
  block with an infinity or a NaN decodes to NaN: faults stay visible.

  Args:
    x: [..., D] floats; `block` divides D.
    block: neighbouring channels that share a scale; even.

  Raises:
    ValueError: `block` is odd, or does not divide D.
  """
  if block % 2 or x.shape[-1] % block:
    raise ValueError(
      f'x {list(x.shape)}, block {block}: expected an even block that divides the last axis'
    )
  blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, block)
  largest = jnp.max(jnp.abs(blocks), axis=-1)
  scales = jnp.where(jnp.isfinite(largest), largest / LARGEST, jnp.nan)
  # A block of zeros has no scale; dividing by any other number gives its zeros.
  divisor = jnp.where(scales == 0, 1.0, scales)[..., None]
  # The quotient may exceed 7 by a rounding error of the division.
  values = jnp.clip(jnp.round(blocks / divisor), -LARGEST, LARGEST).astype(jnp.int8)
  pairs = jax.lax.bitcast_convert_type(values, jnp.uint8).reshape(*x.shape[:-1], -1, 2)
  return Int4Blocks((pairs[..., 0] & 15) | (pairs[..., 1] << 4), scales)


def decode(encoded: Int4Blocks, block: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
  """Returns the array [..., D] that `encode` rounded with this `block`."""
  packed = encoded.values
  codes = jnp.stack([packed & 15, packed >> 4], axis=-1).astype(jnp.int8)
  # Of a four-bit two's complement, 8 to 15 are -8 to -1.
  values = jnp.where(codes > LARGEST, codes - 16, codes).astype(jnp.float32)
  blocks = values.reshape(*packed.shape[:-1], -1, block) * encoded.scales[..., None]
  return blocks.reshape(*packed.shape[:-1], -1).astype(dtype)
