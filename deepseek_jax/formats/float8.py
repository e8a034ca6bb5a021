"""Eight-bit floats (E4M3) with one scale a tile: weights of V3 and later, and their activations."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.formats.powers import ceil_power_of_two

LARGEST = 448.0
"""Largest finite number of E4M3; what is beyond becomes NaN in a cast, not infinity."""
LEAST = 1e-4
"""Magnitude below which a tile's largest counts as this much, so that zeros have a scale."""

Tile = tuple[int, int]
Scale = Literal['float32', 'power']


class Float8Tiles(NamedTuple):
  """A matrix, or a stack of them, in a quarter of float32's memory.

  Attributes:
    values: [..., M, N] float8_e4m3fn.
    scales: [..., ⌈M / m⌉, ⌈N / n⌉] float32 or float8_e8m0fnu, one a tile [m, n]; those at the ends
      may be smaller. A number is its value times its tile's scale, whatever checkpoints call it
      (`weight_scale_inv`).
  """

  values: jax.Array
  scales: jax.Array


def encode(x: jax.Array, tile: Tile = (128, 128), scale: Scale = 'power') -> Float8Tiles:
  """Rounds each tile of the last two axes to E4M3, its largest magnitude to 448 or below.

  A tile with an infinity or a NaN decodes to NaN: faults stay visible.

  Args:
    x: [..., M, N] floats. Rows of activations take tiles of (1, 128).
    tile: rows and columns that share a scale.
    scale: 'float32' divides by the largest magnitude over 448, as V3 does; 'power' by the power of
      two at or above it, which has no bits to lose, as V3.1 (activations) and V4 do.

  Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2; the released kernels of V3.2 and V4.
  """
  wide = x.astype(jnp.float32)
  tiles = _tiles(wide, tile)
  largest = jnp.max(jnp.abs(tiles), axis=(-3, -1))
  scales = jnp.maximum(largest, LEAST) / LARGEST
  if scale == 'power':
    scales = ceil_power_of_two(scales)
  divided = tiles / scales[..., :, None, :, None]
  values = jnp.clip(divided, -LARGEST, LARGEST).astype(jnp.float8_e4m3fn)
  dtype = jnp.float8_e8m0fnu if scale == 'power' else jnp.float32
  return Float8Tiles(_whole(values, x.shape), scales.astype(dtype))


def decode(
  encoded: Float8Tiles, tile: Tile = (128, 128), dtype: DTypeLike = jnp.float32
) -> jax.Array:
  """Returns the numbers [..., M, N] that `encode` rounded with this `tile`."""
  tiles = _tiles(encoded.values.astype(jnp.float32), tile)
  scales = encoded.scales.astype(jnp.float32)
  return _whole(tiles * scales[..., :, None, :, None], encoded.values.shape).astype(dtype)


def _tiles(x: jax.Array, tile: Tile) -> jax.Array:
  """[..., M, N] -> [..., ⌈M / m⌉, m, ⌈N / n⌉, n], with zeros at the ends."""
  short = [-size % part for size, part in zip(x.shape[-2:], tile, strict=True)]
  if any(short):
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, end) for end in short])
  return x.reshape(*x.shape[:-2], -1, tile[0], x.shape[-1] // tile[1], tile[1])


def _whole(tiles: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The inverse of `_tiles`."""
  *outer, m, rows, n, columns = tiles.shape
  return tiles.reshape(*outer, m * rows, n * columns)[..., : shape[-2], : shape[-1]]
