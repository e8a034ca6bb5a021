"""Meshes and clouds of points in files, as clouds of one size."""

import io
import zlib
from typing import Any

import numpy as np

from deepseek_jax.data.media.optional import need
from deepseek_jax.data.media.record import UnreadableError

_GREY = 0.5
# Formats in which points without faces are meant.
_CLOUDS = ('ply', 'glb')


def read_points(ending: str, data: bytes, count: int) -> np.ndarray:
  """A cloud [P, 6] float32: x, y, z in a ball of radius 1 around 0, and red, green, blue.

  Points of a mesh are spread evenly over its surface, always the same ones for the same file. What
  has no colours is grey.

  Args:
    ending: of the file's name, which says the format: 'npy' holds [n, 3] or [n, 6].
    data: the content.
    count: P.

  Raises:
    UnreadableError: it has no surface and no points, or some that are not finite.
    ConfigError: trimesh is not installed, and it is not NumPy's.
  """
  rng = np.random.default_rng(zlib.crc32(data))
  if ending == 'npy':
    points, colours = _from_array(data)
  else:
    points, colours = _from_mesh(ending, data, count, rng)
  if not np.isfinite(points).all():
    raise UnreadableError('coordinates that are not finite')
  if len(points) < 4:
    raise UnreadableError(f'{len(points)} points, too few to see')
  chosen = rng.choice(len(points), count, replace=len(points) < count)
  shades = np.full((count, 3), _GREY) if colours is None else np.clip(colours[chosen], 0, 1)
  return np.concatenate([centred(points[chosen]), shades], axis=1).astype(np.float32)


def centred(points: np.ndarray) -> np.ndarray:
  """Points [P, 3] moved and shrunk so that their box's middle is 0 and the farthest is at 1.

  Raises:
    UnreadableError: all points are in one place.
  """
  low, high = points.min(axis=0), points.max(axis=0)
  extent = float((high - low).max())
  if not np.isfinite(extent) or extent <= 1e-9 * max(1.0, float(np.abs(points).max())):
    raise UnreadableError('all points are in one place')
  points = (points - (low + high) / 2) / extent
  return points / np.linalg.norm(points, axis=1).max()


def _from_array(data: bytes) -> tuple[np.ndarray, np.ndarray | None]:
  """Points [n, 3] and colours [n, 3] of an array in a file."""
  array = np.load(io.BytesIO(data), allow_pickle=False)
  if array.ndim != 2 or array.shape[1] not in (3, 6) or array.dtype.kind not in 'fiu':
    raise UnreadableError(
      f'an array {array.dtype} {list(array.shape)}, expected numbers [n, 3 or 6]'
    )
  array = array.astype(np.float64)
  if not np.isfinite(array).all():
    raise UnreadableError('numbers that are not finite')
  return array[:, :3], array[:, 3:] if array.shape[1] == 6 else None


def _from_mesh(
  ending: str, data: bytes, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
  """Points and colours of a mesh's surface, or of a cloud without faces."""
  need('trimesh', f'a .{ending} file')
  import trimesh

  loaded: Any = trimesh.load(io.BytesIO(data), file_type=ending, process=False)
  if isinstance(loaded, trimesh.Scene):
    if not loaded.geometry:
      raise UnreadableError('nothing in it')
    loaded = loaded.to_mesh() if hasattr(loaded, 'to_mesh') else loaded.dump(concatenate=True)
  vertices = np.asarray(loaded.vertices, np.float64)
  if not len(vertices):
    raise UnreadableError('no vertices')
  if not np.isfinite(vertices).all():
    raise UnreadableError('vertices that are not finite')
  # trimesh takes any file without faces for a cloud; in a format of meshes it is a broken mesh.
  if ending in _CLOUDS and not len(getattr(loaded, 'faces', ())):
    colours = getattr(loaded, 'colors', None)
    known = colours is not None and len(colours) == len(vertices)
    return vertices, np.asarray(colours)[:, :3] / 255 if known else None
  if not hasattr(loaded, 'faces') or not len(loaded.faces):
    raise UnreadableError('a mesh without faces')
  faces = np.asarray(loaded.faces)
  if faces.min() < 0 or faces.max() >= len(vertices):
    raise UnreadableError(f'a face with vertex {faces.max()} of {len(vertices)}')
  return _spread(vertices, faces, _face_colours(loaded), count, rng)


def _face_colours(mesh) -> np.ndarray | None:
  """Colours [faces, 3] from 0 to 1 of a mesh that has some."""
  if getattr(mesh.visual, 'kind', None) not in ('face', 'vertex'):
    return None
  return np.asarray(mesh.visual.face_colors)[:, :3] / 255


def _spread(
  vertices: np.ndarray,
  faces: np.ndarray,
  colours: np.ndarray | None,
  count: int,
  rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray | None]:
  """Points [P, 3] spread evenly over triangles, and their colours."""
  a, b, c = (vertices[faces[:, k]] for k in range(3))
  areas = np.linalg.norm(np.cross(b - a, c - a), axis=1)
  total = areas.sum()
  if not np.isfinite(total) or total <= 0:
    raise UnreadableError('a mesh without a surface: all its faces are flat lines or points')
  face = rng.choice(len(faces), count, p=areas / total)
  u, v = rng.random((2, count, 1))
  # The other half of the parallelogram is folded back.
  u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
  points = a[face] + u * (b - a)[face] + v * (c - a)[face]
  return points, None if colours is None else colours[face]
