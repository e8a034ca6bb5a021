"""A ring holds the last tokens of each row, wherever rows stand and however they were fed."""

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.layers.attention import ring

COUNT, SPARE = 3, 2


def fed(state, values, starts, counts):
  """Feeds `counts` [B] of the values [B, T], a token's value standing for it."""
  offsets = np.arange(values.shape[1])
  positions = np.array(starts)[:, None] + offsets
  real = offsets < np.array(counts)[:, None]
  return ring.write(state, jnp.asarray(values[..., None]), jnp.asarray(positions), real)


def held(state, starts):
  rows, places = ring.before(state, jnp.asarray(starts)[:, None], COUNT)
  return np.asarray(rows)[..., 0], np.asarray(places)


def test_rows_of_their_own():
  """One row gets more than fits, one a little, one nothing but padding."""
  state = jnp.zeros((3, COUNT + SPARE, 1))
  values = np.arange(24.0).reshape(3, 8) + 100
  state = fed(state, values, (0, 0, 0), (8, 2, 0))
  rows, places = held(state, (8, 2, 0))
  np.testing.assert_array_equal(places, [[5, 6, 7], [-1, 0, 1], [-3, -2, -1]])
  np.testing.assert_array_equal(rows[0], values[0, 5:])
  np.testing.assert_array_equal(rows[1, 1:], values[1, :2])
  np.testing.assert_array_equal(state[2], 0)


@pytest.mark.parametrize('back', range(SPARE + 1))
def test_steps_back(back):
  """Again and again: what was taken back is written over, what stands is still there."""
  state, true, at = jnp.zeros((1, COUNT + SPARE, 1)), np.arange(100.0)[None], 0
  for _ in range(9):
    new = np.where(np.arange(SPARE + 1) < SPARE + 1 - back, true[:, at : at + SPARE + 1], -1.0)
    state = fed(state, new, (at,), (SPARE + 1,))
    at += SPARE + 1 - back
    rows, places = held(state, (at,))
    there = places[0] >= 0
    np.testing.assert_array_equal(rows[0][there], places[0][there])


def test_an_empty_ring():
  """A block of one token needs none before it."""
  state = jnp.zeros((2, 0, 4))
  state = ring.write(state, jnp.ones((2, 3, 4)), jnp.zeros((2, 3), int), jnp.ones((2, 3), bool))
  assert state.shape == (2, 0, 4)
  assert ring.before(state, jnp.zeros((2, 1), int), 0)[0].shape == (2, 0, 4)
