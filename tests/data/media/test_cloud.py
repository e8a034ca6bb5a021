"""Clouds are spread evenly over the solids that their captions name, standing where they say."""

import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.media.cloud import RELATIONS, Arrangement, Clouds, Thing
from deepseek_jax.data.media.figure import COLOURS
from deepseek_jax.data.media.made import Made
from deepseek_jax.data.media.solid import SOLIDS, Solid


def outside(solid: Solid, points: np.ndarray) -> np.ndarray:
  """How far points [n, 3] are from a solid's surface, by its equation."""
  r, h = solid.radius, solid.height
  x, y, z = points.T
  flat = np.hypot(x, y)
  match solid.kind:
    case 'sphere':
      return np.abs(np.linalg.norm(points - [0, 0, r], axis=1) - r)
    case 'box':
      return np.abs(np.max(np.abs(points - [0, 0, h / 2]) / [r, r, h / 2], axis=1) - 1)
    case 'cylinder':
      wall = np.where((z >= 0) & (z <= h), np.abs(flat - r), np.inf)
      return np.minimum(
        wall, np.where(flat <= r + 1e-9, np.minimum(np.abs(z), np.abs(z - h)), np.inf)
      )
    case 'cone':
      wall = np.abs(flat - r * (1 - z / h))
      return np.minimum(wall, np.where(flat <= r + 1e-9, np.abs(z), np.inf))
    case 'torus':
      return np.abs(np.hypot(flat - 0.75 * r, z - 0.25 * r) - 0.25 * r)
  middle = np.clip(z, r, h - r)
  return np.abs(np.hypot(flat, z - middle) - r)


@pytest.mark.parametrize('kind', SOLIDS)
def test_points_lie_evenly_on_the_surface(kind):
  """Their equation, and the share of them below a quarter of the height."""
  radius, height = {'sphere': (0.5, 1.0), 'box': (0.5, 0.8), 'cylinder': (0.5, 1.0)}.get(
    kind, (0.8, 0.4) if kind == 'torus' else (0.3, 1.0) if kind == 'capsule' else (0.5, 1.2)
  )
  solid = Solid(kind=kind, radius=radius, height=height)
  points = solid.surface(np.random.default_rng(0), 20_000)
  assert points.shape == (20_000, 3)
  assert outside(solid, points).max() < 1e-9
  low, high = points[:, 2].min(), points[:, 2].max()
  assert low == pytest.approx(0, abs=0.01)
  assert high == pytest.approx(solid.tall, abs=0.02)
  share = np.mean(points[:, 2] <= 0.25 * solid.tall + 1e-9)
  slant = np.hypot(radius, height)
  wanted = {
    'sphere': 0.25,
    'box': (1.0 + 4 * height * 0.25) / (2.0 + 4 * height),
    'cylinder': (radius + 2 * height * 0.25) / (2 * radius + 2 * height),
    'cone': (radius + slant * (1 - 0.75**2)) / (radius + slant),
    # A tube below half of its radius, seen from its middle, is a third of its circle.
    'torus': 1 / 3,
    'capsule': 0.25,
  }[kind]
  assert share == pytest.approx(wanted, abs=0.012)
  # Turned by a right angle it looks the same.
  assert np.abs(points[:, :2].mean(axis=0)).max() < 0.02
  assert np.cov(points[:, :2].T)[0, 1] == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize('relation', RELATIONS)
def test_things_stand_where_they_are_said_to(relation):
  """No part of the first is on the wrong side of the second; they are told apart by colour."""
  source, rng = Clouds(points=400, noise=0.0), np.random.default_rng(0)
  for kind in SOLIDS:
    size = 'small' if kind in ('sphere', 'torus', 'capsule') else 'flat'
    scene = Arrangement(Thing('large', 'red', 'box'), relation, Thing(size, 'blue', kind))
    (cloud,) = source.paint(scene, rng, 'train')
    red = cloud[:, 3] > cloud[:, 5]
    axis = int(np.argmax(np.abs(RELATIONS[relation])))
    sign = RELATIONS[relation][axis]
    first, second = sign * cloud[red][:, axis], sign * cloud[~red][:, axis]
    assert first.min() > second.max()
    assert 0.24 < red.mean() < 0.76


def test_clouds():
  """In a ball of radius 1 around 0, in the colours of the caption; sizes can be told."""
  source = Clouds(points=128, made=Made(train=150, heldout=2))
  records = source.open()
  radii = {'small': [], 'large': []}
  for index in range(150):
    scene, _ = records.scene('train', index)
    (cloud,) = records.render('train', index)
    assert np.linalg.norm(cloud[:, :3], axis=1).max() <= 1.05
    for thing in filter(None, (scene.first, scene.second)):
      shade = np.array(COLOURS[thing.colour]) / 255
      near = np.abs(cloud[:, 3:] - shade * 0.92).max(axis=1) < 0.2
      assert near.mean() > 0.2
    if scene.second is None and scene.first.size in radii:
      radii[scene.first.size].append(np.ptp(cloud[:, 0]))
    assert all(word in records.record('train', index).learnt for word in scene.first)
  assert max(radii['small']) < min(radii['large'])


def test_both_ways_of_saying_it_are_one_content():
  """What is left of something has it to its right."""
  a, b = Thing('tall', 'red', 'cone'), Thing('small', 'blue', 'sphere')
  source = Clouds()
  assert Arrangement(a, 'left of', b).caption == 'a tall red cone left of a small blue sphere'
  for one, other in (('left of', 'right of'), ('above', 'below'), ('behind', 'in front of')):
    first, second = Arrangement(a, one, b), Arrangement(b, other, a)
    assert source.content(first) == source.content(second)
    assert source.content(first) != source.content(Arrangement(a, other, b))


def test_wrong_fields():
  with pytest.raises(ConfigError, match='`points` is 3'):
    Clouds(points=3)
  with pytest.raises(ConfigError, match='`noise` is -1'):
    Clouds(noise=-1)
  with pytest.raises(ValueError, match='expected one of box'):
    Solid(kind='cube', radius=1, height=1)
  with pytest.raises(ValueError, match='two ends of a capsule'):
    Solid(kind='capsule', radius=1, height=1)
