"""Sets of points against loops over points; the order of the points does not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.points import (
  FAR,
  farthest_points,
  local_groups,
  nearest_points,
  squared_distances,
  take_points,
  within_ball,
)

COUNTS = (17, 9, 3)


def cloud(seed=0):
  """Three clouds of up to 17 points, and which of them are real."""
  points = np.random.default_rng(seed).normal(size=(3, 17, 3)).astype(np.float32)
  return points, np.arange(17) < np.array(COUNTS)[:, None]


def farthest_oracle(points, count):
  """One after the other, by looking at all distances anew."""
  first = np.linalg.norm(points - points.mean(axis=0), axis=1).argmax()
  chosen = [int(first)]
  while len(chosen) < count:
    gaps = np.linalg.norm(points[:, None] - points[chosen][None], axis=2).min(axis=1)
    chosen.append(int(gaps.argmax()))
  return chosen


def test_farthest_points():
  points, real = cloud()
  found = np.asarray(farthest_points(jnp.asarray(points), jnp.asarray(real), 5))
  for row, count in enumerate(COUNTS):
    want = farthest_oracle(points[row, :count].astype(np.float64), min(5, count))
    assert found[row, : len(want)].tolist() == want
    assert (found[row] < count).all()


def test_nearest_points():
  points, real = cloud(1)
  centres = np.random.default_rng(2).normal(size=(3, 4, 3)).astype(np.float32)
  indices, far = nearest_points(jnp.asarray(centres), jnp.asarray(points), jnp.asarray(real), 6)
  for row, count in enumerate(COUNTS):
    for g in range(4):
      gaps = ((points[row, :count].astype(np.float64) - centres[row, g]) ** 2).sum(axis=1)
      order = gaps.argsort()[:6]
      kept = len(order)
      assert indices[row, g, :kept].tolist() == order.tolist()
      np.testing.assert_allclose(far[row, g, :kept], gaps[order], rtol=1e-5)
      assert (np.asarray(far[row, g, kept:]) == np.float32(FAR)).all()
  np.testing.assert_allclose(
    squared_distances(jnp.asarray(centres), jnp.asarray(points)),
    ((centres[:, :, None] - points[:, None]) ** 2).sum(-1),
    rtol=1e-5,
  )


def test_balls():
  indices = jnp.array([[[4, 2, 9]]])
  squared = jnp.array([[[0.0, 1.0, 4.1]]])
  assert within_ball(indices, squared, 2.0).tolist() == [[[4, 2, 4]]]
  assert within_ball(indices, squared, 3.0).tolist() == [[[4, 2, 9]]]


def test_groups_are_seen_from_their_centre():
  points = np.random.default_rng(3).normal(size=(2, 7, 5)).astype(np.float32)
  chosen = np.array([[1, 4], [0, 6]])
  neighbours = np.array([[[1, 2, 3], [4, 4, 0]], [[0, 5, 6], [6, 1, 2]]])
  found = local_groups(jnp.asarray(points), jnp.asarray(chosen), jnp.asarray(neighbours))
  for r, g, k in np.ndindex(2, 2, 3):
    want = points[r, neighbours[r, g, k]].copy()
    want[:3] -= points[r, chosen[r, g], :3]
    np.testing.assert_allclose(found[r, g, k], want, rtol=1e-6)

  def total(points):
    return jnp.sum(jnp.sin(local_groups(points, jnp.asarray(chosen), jnp.asarray(neighbours))))

  want = np.zeros_like(points, np.float64)
  for r, g, k in np.ndindex(2, 2, 3):
    slope = np.cos(np.asarray(found[r, g, k], np.float64))
    want[r, neighbours[r, g, k]] += slope
    want[r, chosen[r, g], :3] -= slope[:3]
  np.testing.assert_allclose(jax.grad(total)(jnp.asarray(points)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('seed', range(4))
def test_the_order_of_the_points_does_not_count(seed):
  """The same points are picked in the same order, and have the same neighbours."""
  points, real = cloud(seed)
  order = np.random.default_rng(seed + 9).permutation(17)

  def groups(points, real):
    points, real = jnp.asarray(points), jnp.asarray(real)
    chosen = farthest_points(points, real, 3)
    centres = take_points(points, chosen)
    indices, _ = nearest_points(centres, points, real, 3)
    return np.asarray(centres), np.asarray(take_points(points, indices))

  for found, want in zip(groups(points[:, order], real[:, order]), groups(points, real)):
    np.testing.assert_array_equal(found, want)
