"""Four-bit floats (E2M1) with one scale for 32 neighbours, as OCP's MXFP4: experts of V4."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.formats.powers import ceil_power_of_two

BLOCK = 32
"""Neighbours on the last axis that share a scale."""
LARGEST = 6.0
"""Largest number of E2M1, whose others are 0, 0.5, 1, 1.5, 2, 3 and 4."""
LEAST = LARGEST * 2.0**-126
"""Magnitude below which a block's largest counts as this much."""
GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Float4Blocks(NamedTuple):
  """An array in an eighth of float32's memory.

  Attributes:
    values: [..., N / 2] uint8, two numbers a byte, the first in the low four bits; the highest of
      four is the sign.
    scales: [..., N / 32] float8_e8m0fnu.
  """

  values: jax.Array
  scales: jax.Array


def encode(x: jax.Array) -> Float4Blocks:
  """Rounds each block of 32 on the last axis to E2M1, ties to the even code.

  A block with an infinity or a NaN has the scale NaN: faults stay visible.

  Args:
    x: [..., N] floats; 32 divides N.

  Raises:
    ValueError: 32 does not divide N.

  Source: OCP Microscaling Formats 1.0; the rule of the scale: the released kernels of DeepSeek-V4.
  """
  if x.shape[-1] % BLOCK:
    raise ValueError(f'x {list(x.shape)}: expected a last axis that {BLOCK} divides')
  blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, BLOCK)
  largest = jnp.max(jnp.abs(blocks), axis=-1)
  scales = ceil_power_of_two(jnp.maximum(largest, LEAST) / LARGEST)
  rounded = (blocks / scales[..., None]).reshape(*x.shape[:-1], -1, 2)
  # Codes of magnitudes rise as the numbers do.
  codes = _code(jnp.abs(rounded)) | (jnp.signbit(rounded).astype(jnp.uint8) << 3)
  packed = codes[..., 0] | (codes[..., 1] << 4)
  return Float4Blocks(packed, scales.astype(jnp.float8_e8m0fnu))


def decode(encoded: Float4Blocks, dtype: DTypeLike = jnp.float32) -> jax.Array:
  """Returns the numbers [..., N] that `encode` rounded."""
  packed = encoded.values
  codes = jnp.stack([packed & 15, packed >> 4], axis=-1)
  magnitudes = jnp.asarray(GRID, jnp.float32)[codes & 7]
  numbers = jnp.where(codes & 8, -magnitudes, magnitudes)
  blocks = numbers.reshape(*packed.shape[:-1], -1, BLOCK)
  wide = blocks * encoded.scales.astype(jnp.float32)[..., None]
  return wide.reshape(*packed.shape[:-1], -1).astype(dtype)


def _code(magnitude: jax.Array) -> jax.Array:
  """The number in `GRID` that is nearest, as its place; of two as near, the even place."""
  middles = [(low + high) / 2 for low, high in itertools.pairwise(GRID)]
  code = jnp.zeros(magnitude.shape, jnp.uint8)
  for place, middle in enumerate(middles):
    # From an even place a tie stays; from an odd one it goes up.
    above = magnitude > middle if place % 2 == 0 else magnitude >= middle
    code += above.astype(jnp.uint8)
  return code
