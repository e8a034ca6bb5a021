"""Sets of points in space: which to keep, and which lie together. No order of the points counts."""

import jax
import jax.numpy as jnp

FAR = 1e30
"""A squared distance that no two points have."""


def squared_distances(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the squared distances [R, G, P] float32 of points [R, G, 3] from points [R, P, 3].

  By differences: |a|² + |b|² - 2ab would lose the digits that near neighbours differ in.
  """
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return jnp.sum(jnp.square(a[:, :, None] - b[:, None]), axis=-1)


def farthest_points(points: jax.Array, real: jax.Array, count: int) -> jax.Array:
  """Picks points that are spread over a cloud: each is the farthest from all that were picked.

  The first is the farthest from the middle, so that the choice does not depend on the order of the
  points (but for ties).

  Args:
    points: [R, P, 3].
    real: [R, P] bool; the others are never picked while there is a real one.
    count: points to pick, G.

  Returns:
    [R, G] int32. Where a cloud has fewer real points than G, the last ones repeat.

  Source: Eldar et al., IEEE Transactions on Image Processing 6(9), 1997; Qi et al., PointNet++,
    arXiv 1706.02413, section 3.2.
  """
  points = jax.lax.stop_gradient(points.astype(jnp.float32))
  weights = real[..., None].astype(jnp.float32)
  middle = jnp.sum(points * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1.0)

  def distance(place):
    return jnp.where(real, jnp.sum(jnp.square(points - place[:, None]), axis=-1), -1.0)

  def pick(nearest, _):
    chosen = jnp.argmax(nearest, axis=-1)
    place = jnp.take_along_axis(points, chosen[:, None, None], axis=1)[:, 0]
    return jnp.minimum(nearest, distance(place)), chosen

  far = distance(middle)
  first = jnp.argmax(far, axis=-1)
  place = jnp.take_along_axis(points, first[:, None, None], axis=1)[:, 0]
  _, rest = jax.lax.scan(pick, distance(place), length=count - 1)
  return jnp.concatenate([first[:, None], rest.T], axis=1).astype(jnp.int32)


def nearest_points(
  centres: jax.Array, points: jax.Array, real: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
  """Finds the points around each centre.

  Args:
    centres: [R, G, 3].
    points: [R, P, 3].
    real: [R, P] bool.
    count: neighbours K of each centre, at most P.

  Returns:
    [R, G, K] int32, nearest first; and their squared distances [R, G, K] float32, `FAR` where
    there is no real point left.

  Source: Qi et al., PointNet++, arXiv 1706.02413, section 3.2 (k nearest neighbours).
  """
  far = jax.lax.stop_gradient(squared_distances(centres, points))
  far = jnp.where(real[:, None], far, FAR)
  negative, indices = jax.lax.top_k(-far, count)
  return indices.astype(jnp.int32), -negative


def within_ball(indices: jax.Array, squared: jax.Array, radius: float) -> jax.Array:
  """Puts the nearest point in the place of neighbours outside of a ball, or of none.

  Args:
    indices: [R, G, K] int32, nearest first.
    squared: [R, G, K] float32 squared distances.
    radius: of the ball.

  Returns:
    [R, G, K] int32.

  Source: Qi et al., PointNet++, arXiv 1706.02413, section 3.2 (ball query).
  """
  return jnp.where(squared <= radius**2, indices, indices[..., :1])


def take_points(points: jax.Array, indices: jax.Array) -> jax.Array:
  """Returns the points [R, …, D] at `indices` [R, …] of points [R, P, D]."""
  flat = indices.reshape(indices.shape[0], -1, 1)
  return jnp.take_along_axis(points, flat, axis=1).reshape(*indices.shape, points.shape[-1])


def local_groups(points: jax.Array, chosen: jax.Array, neighbours: jax.Array) -> jax.Array:
  """Gathers the points around each centre, seen from the centre.

  Args:
    points: [R, P, 3 + C] coordinates, then features.
    chosen: [R, G] int32 which are centres.
    neighbours: [R, G, K] int32.

  Returns:
    [R, G, K, 3 + C]; coordinates are those of the point less those of the centre.
  """
  groups = take_points(points, neighbours)
  centres = take_points(points[..., :3], chosen)[:, :, None]
  return jnp.concatenate([groups[..., :3] - centres, groups[..., 3:]], axis=-1)
