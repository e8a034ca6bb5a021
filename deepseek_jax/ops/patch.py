"""Pictures cut into patches, and neighbouring patches joined."""

import math

import jax
import jax.numpy as jnp


def extract_patches(images: jax.Array, size: int) -> jax.Array:
  """Cuts pictures into squares.

  Args:
    images: [R, Y, X, C], both sides multiples of `size`.
    size: pixels P of a side of a square.

  Returns:
    [R, N, P · P · C]: squares row by row from the upper left, the pixels of each likewise.
  """
  rows, height, width, channels = images.shape
  grid = images.reshape(rows, height // size, size, width // size, size, channels)
  patches = grid.transpose(0, 1, 3, 2, 4, 5)
  return patches.reshape(rows, -1, size * size * channels)


def merge_neighbours(tokens: jax.Array, side: int) -> jax.Array:
  """Joins each square of `side` × `side` neighbouring tokens of a square grid into one.

  Args:
    tokens: [R, N, D], a grid of √N × √N, row by row.
    side: tokens of a side of a square.

  Returns:
    [R, N / side², side² · D]; the channels of the upper left token come first.

  Source: DeepSeek-VL2, arXiv 2412.10302, section 2 (pixel shuffle of the adaptor).
  """
  rows, count, width = tokens.shape
  grid = math.isqrt(count) // side
  tokens = tokens.reshape(rows, grid, side, grid, side, width).transpose(0, 1, 3, 2, 4, 5)
  return tokens.reshape(rows, grid * grid, side * side * width)


def place_media(embedded: jax.Array, media: jax.Array, placeholders: jax.Array) -> jax.Array:
  """Puts embeddings of media where a row of tokens has placeholders.

  Args:
    embedded: [B, T, D] embeddings of the tokens.
    media: [B, S, D] embeddings of all the media of each row.
    placeholders: [B, T] int32 which of the S stands there; negative keeps the token.

  Returns:
    [B, T, D]. A gather of fixed shape: how many placeholders a row has changes no shape.
  """
  chosen = jnp.take_along_axis(media, jnp.maximum(placeholders, 0)[..., None], axis=1)
  return jnp.where((placeholders >= 0)[..., None], chosen, embedded)
