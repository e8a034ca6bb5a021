"""Cutting, joining and placing, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.patch import (
  convolve,
  extract_blocks,
  extract_patches,
  grid_coordinates,
  merge_neighbours,
  place_media,
  unshuffle_neighbours,
)


@pytest.mark.parametrize(('height', 'width', 'size'), [(6, 6, 2), (4, 12, 4), (3, 3, 1)])
def test_patches(height, width, size):
  """Row by row, pixels likewise; also of pictures that are not square."""
  images = np.arange(2 * height * width * 3).reshape(2, height, width, 3)
  want = [
    [
      images[r, y : y + size, x : x + size].reshape(-1)
      for y in range(0, height, size)
      for x in range(0, width, size)
    ]
    for r in range(2)
  ]
  np.testing.assert_array_equal(extract_patches(jnp.asarray(images), size), want)


@pytest.mark.parametrize(('grid', 'side'), [(4, 2), (6, 3), (3, 1)])
def test_neighbours(grid, side):
  """The upper left one first."""
  tokens = np.arange(2 * grid * grid * 5).reshape(2, grid, grid, 5)
  want = [
    [
      np.concatenate([tokens[r, y + i, x + j] for i in range(side) for j in range(side)])
      for y in range(0, grid, side)
      for x in range(0, grid, side)
    ]
    for r in range(2)
  ]
  found = merge_neighbours(jnp.asarray(tokens.reshape(2, grid * grid, 5)), side)
  np.testing.assert_array_equal(found, want)


def test_placing():
  """Any order, any number, repeated too; other tokens stay."""
  rng = np.random.default_rng(0)
  embedded, media = rng.normal(size=(3, 7, 4)), rng.normal(size=(3, 5, 4))
  places = np.array([[-1, 0, 1, 2, 3, 4, -1], [4, -1, 0, -1, 0, -1, 2], [-1] * 7], np.int32)
  found = np.asarray(place_media(jnp.asarray(embedded), jnp.asarray(media), jnp.asarray(places)))
  for b, t in np.ndindex(places.shape):
    want = embedded[b, t] if places[b, t] < 0 else media[b, places[b, t]]
    np.testing.assert_allclose(found[b, t], want, rtol=1e-6)


def test_marks():
  """Negative places that stand for vectors of their own."""
  embedded, media = jnp.zeros((1, 4, 3)), jnp.ones((1, 2, 3))
  marks = [(-2, jnp.full(3, 5.0)), (-3, jnp.full(3, 7.0))]
  found = place_media(embedded, media, jnp.array([[-1, 1, -2, -3]]), marks)
  assert found[0, :, 0].tolist() == [0, 1, 5, 7]


@pytest.mark.parametrize(('frames', 'side', 'span', 'size'), [(4, 6, 2, 3), (3, 4, 1, 2)])
def test_blocks(frames, side, span, size):
  """By time, then row by row, pixels likewise."""
  clips = np.arange(2 * frames * side * side * 3).reshape(2, frames, side, side, 3)
  want = [
    [
      clips[r, f : f + span, y : y + size, x : x + size].reshape(-1)
      for f in range(0, frames, span)
      for y in range(0, side, size)
      for x in range(0, side, size)
    ]
    for r in range(2)
  ]
  np.testing.assert_array_equal(extract_blocks(jnp.asarray(clips), span, size), want)
  places = grid_coordinates((frames // span, side // size, side // size))
  assert places.tolist() == [list(place) for place in np.ndindex(*places.max(axis=0) + 1)]


@pytest.mark.parametrize(('grid', 'side'), [(4, 2), (3, 2), (27, 2), (5, 3)])
def test_unshuffled_neighbours(grid, side):
  """Channel c of the token (y, x) of a square is at c · side² + y · side + x; zeros fill it up."""
  tokens = np.random.default_rng(0).normal(size=(2, grid * grid, 3)).astype(np.float32)
  found = np.asarray(unshuffle_neighbours(jnp.asarray(tokens), side))
  squares = -(-grid // side)
  assert found.shape == (2, squares**2, 3 * side**2)
  for r, s, c, y, x in np.ndindex(2, squares**2, 3, side, side):
    row, column = s // squares * side + y, s % squares * side + x
    inside = row < grid and column < grid
    want = tokens[r, row * grid + column, c] if inside else 0.0
    assert found[r, s, c * side**2 + y * side + x] == want


@pytest.mark.parametrize(('length', 'size', 'stride'), [(7, 3, 1), (7, 3, 2), (8, 5, 2), (4, 1, 3)])
def test_convolution(length, size, stride):
  """Against a loop over places, and its gradient against that of XLA's convolution."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, length, 3)).astype(np.float32)
  kernel = rng.normal(size=(size, 3, 4)).astype(np.float32)
  found = convolve(jnp.asarray(x), jnp.asarray(kernel), stride)
  padded = np.pad(x, ((0, 0), (size // 2, size // 2), (0, 0)))
  for t in range(-(-length // stride)):
    want = np.einsum('rkc,kcd->rd', padded[:, t * stride : t * stride + size], kernel)
    np.testing.assert_allclose(found[:, t], want, rtol=1e-4, atol=1e-5)

  def other(x, kernel):
    half = size // 2
    return jax.lax.conv_general_dilated(
      x, kernel, (stride,), [(half, half)], dimension_numbers=('NTC', 'TIO', 'NTC')
    )

  both = [
    jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1))(x, kernel)
    for f in (lambda x, k: convolve(x, k, stride), other)
  ]
  for a, b in zip(*both):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
