"""Cutting, joining and placing, against loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.patch import extract_patches, merge_neighbours, place_media


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
