"""Pictures and clips cut into patches, neighbours joined, and media put among tokens."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


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


def extract_blocks(clips: jax.Array, span: int, size: int) -> jax.Array:
  """Cuts clips into blocks of a few frames of a square each.

  Args:
    clips: [R, F, Y, X, C]; F is a multiple of `span`, both sides are multiples of `size`.
    span: frames of a block.
    size: pixels P of a side of a block.

  Returns:
    [R, N, span · P · P · C]: blocks by time, then row by row; the pixels of each likewise.
  """
  rows, count, height, width, channels = clips.shape
  grid = (count // span, span, height // size, size, width // size, size)
  blocks = clips.reshape(rows, *grid, channels).transpose(0, 1, 3, 5, 2, 4, 6, 7)
  return blocks.reshape(rows, -1, span * size * size * channels)


def grid_coordinates(sizes: Sequence[int]) -> np.ndarray:
  """Returns the place of each token of a grid along its A axes, [N, A] int32, last axis fastest."""
  axes = np.meshgrid(*(np.arange(size) for size in sizes), indexing='ij')
  return np.stack(axes, axis=-1).reshape(-1, len(sizes)).astype(np.int32)


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


def unshuffle_neighbours(tokens: jax.Array, side: int) -> jax.Array:
  """Joins squares of neighbouring tokens as `merge_neighbours` does, in another order of channels.

  Args:
    tokens: [R, N, D], a grid of √N × √N, row by row; zeros fill it up to a multiple of `side`.
    side: tokens of a side of a square.

  Returns:
    [R, ⌈√N / side⌉², D · side²]; channel c of the token (y, x) of a square is at
    (c · side + y) · side + x.

  Source: DeepSeek-VL2, arXiv 2412.10302, section 2, as its published weights expect it.
  """
  rows, count, width = tokens.shape
  grid = math.isqrt(count)
  squares = -(-grid // side)
  more = squares * side - grid
  tokens = tokens.reshape(rows, grid, grid, width)
  tokens = jnp.pad(tokens, ((0, 0), (0, more), (0, more), (0, 0)))
  tokens = tokens.reshape(rows, squares, side, squares, side, width).transpose(0, 1, 3, 5, 2, 4)
  return tokens.reshape(rows, squares * squares, width * side * side)


def place_media(
  embedded: jax.Array,
  media: jax.Array,
  placeholders: jax.Array,
  marks: Sequence[tuple[int, jax.Array]] = (),
) -> jax.Array:
  """Puts embeddings of media where a row of tokens has placeholders.

  Args:
    embedded: [B, T, D] embeddings of the tokens.
    media: [B, S, D] embeddings of all the media of each row.
    placeholders: [B, T] int32 which of the S stands there; negative keeps the token.
    marks: negative placeholders that stand for vectors [D] of their own.

  Returns:
    [B, T, D]. A gather of fixed shape: how many placeholders a row has changes no shape.
  """
  chosen = jnp.take_along_axis(media, jnp.maximum(placeholders, 0)[..., None], axis=1)
  result = jnp.where((placeholders >= 0)[..., None], chosen, embedded)
  for number, vector in marks:
    result = jnp.where((placeholders == number)[..., None], vector.astype(result.dtype), result)
  return result


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """Slides a kernel along sequences.

  Args:
    x: [R, T, C].
    kernel: [K, C, D], K odd.
    stride: tokens from one place to the next.

  Returns:
    [R, ⌈T / stride⌉, D]; output t is centred on input t · stride, and beyond the ends are zeros.
  """
  half = kernel.shape[0] // 2
  count = -(-x.shape[1] // stride)
  x = jnp.pad(x, ((0, 0), (half, half), (0, 0)))
  # One product with the inputs of a place side by side, which any backend does fast.
  last = (count - 1) * stride + 1
  pieces = [x[:, i : i + last : stride] for i in range(kernel.shape[0])]
  flat = kernel.reshape(-1, kernel.shape[-1])
  return jnp.einsum('rtc,cd->rtd', jnp.concatenate(pieces, axis=-1), flat)
