"""Clouds of points of coloured solids, alone or two beside each other, and what they are."""

import dataclasses
from typing import NamedTuple

import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.media.figure import COLOURS
from deepseek_jax.data.media.made import Made, Maker, article, pick
from deepseek_jax.data.media.record import Form, Learnt, Medium, Part
from deepseek_jax.data.media.solid import SOLIDS, Solid
from deepseek_jax.data.split import Split

# Radius and height of each size; what is tall or flat has an axis that shows it.
SIZES = {'small': (0.22, 0.45), 'large': (0.45, 0.9), 'tall': (0.25, 1.2), 'flat': (0.5, 0.25)}
_ROUND = ('sphere', 'torus')

EXTENT = 1.8
"""Half of the longest diagonal that a cloud can have, before it is scaled to 1."""

RELATIONS = {
  'left of': (-1, 0, 0),
  'right of': (1, 0, 0),
  'in front of': (0, -1, 0),
  'behind': (0, 1, 0),
  'above': (0, 0, 1),
  'below': (0, 0, -1),
}
"""Where the first of two things is, seen from the second: x to the right, y away, z upwards."""


class Thing(NamedTuple):
  """A solid in words.

  Attributes:
    size: one of `SIZES`.
    colour: one of `COLOURS`.
    kind: one of `SOLIDS`.
  """

  size: str
  colour: str
  kind: str


class Arrangement(NamedTuple):
  """One thing, or two.

  Attributes:
    first: a thing.
    relation: where the first is, seen from the second; '' if there is no second.
    second: another thing, or None.
  """

  first: Thing
  relation: str
  second: Thing | None

  @property
  def caption(self) -> str:
    """What it is: 'a tall red cone left of a small blue sphere'."""
    caption = article(' '.join(self.first))
    return f'{caption} {self.relation} {article(" ".join(self.second))}' if self.second else caption


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clouds(Maker[Arrangement]):
  """Points of the surfaces of one coloured solid or of two, with captions.

  Points are x (to the right), y (away), z (upwards), and red, green, blue from 0 to 1. The cloud's
  middle is the origin; all clouds have one scale, in which two large things beside each other fit
  in a ball of radius 1, so that size can be seen.

  Attributes:
    points: P, of a cloud; each of two solids has its share by size of surface, at least a quarter.
    noise: standard deviation of every coordinate.
    made: how many clouds, and which are held out.
  """

  points: int = 512
  noise: float = 0.005
  made: Made = Made()

  def __post_init__(self):
    errors = []
    if self.points < 16:
      errors.append(f'`points` is {self.points}; expected 16 or more')
    if not self.noise >= 0:
      errors.append(f'`noise` is {self.noise}; expected 0 or more')
    if errors:
      raise ConfigError(errors)

  @property
  def forms(self) -> dict[str, Form]:
    """Clouds [P, 6] float32."""
    return {'points': Form(shape=(self.points, 6), dtype='float32')}

  def draw(self, rng: np.random.Generator) -> Arrangement:
    """Draws one thing, or two that differ in kind and colour."""
    first = self._thing(rng)
    if rng.random() < 0.5:
      return Arrangement(first, '', None)
    second = self._thing(rng)
    while second.kind == first.kind or second.colour == first.colour:
      second = self._thing(rng)
    return Arrangement(first, pick(rng, tuple(RELATIONS)), second)

  def _thing(self, rng: np.random.Generator) -> Thing:
    kind = pick(rng, SOLIDS)
    sizes = ('small', 'large') if kind in _ROUND else tuple(SIZES)
    if kind == 'capsule':
      sizes = ('small', 'large', 'tall')
    return Thing(pick(rng, sizes), pick(rng, tuple(COLOURS)), kind)

  def content(self, scene: Arrangement) -> str:
    """What is seen, whichever of two things the caption names first."""
    if scene.second is None:
      return scene.caption
    step = RELATIONS[scene.relation]
    if sum(step) > 0:
      return scene.caption
    opposite = next(r for r, s in RELATIONS.items() if s == tuple(-x for x in step))
    return Arrangement(scene.second, opposite, scene.first).caption

  def parts(self, scene: Arrangement) -> tuple[Part, ...]:
    """The cloud, then its caption."""
    return Medium(modality='points'), Learnt(text=scene.caption)

  def facts(self, scene: Arrangement) -> dict:
    """The keywords of the caption: each thing's words, and how they stand."""
    words = [*scene.first, *(scene.second or ()), *filter(None, [scene.relation])]
    return {'keywords': list(dict.fromkeys(words))}

  def paint(self, scene: Arrangement, rng: np.random.Generator, split: Split) -> list[np.ndarray]:
    """The cloud [P, 6] float32."""
    del split
    things = [scene.first, *([scene.second] if scene.second else [])]
    solids = [solid(thing, rng) for thing in things]
    shares = np.array([s.radius * (s.radius + s.tall) for s in solids])
    shares = np.clip(shares / shares.sum(), 0.25, 0.75) if len(solids) > 1 else np.ones(1)
    split_at = round(self.points * shares[0])
    counts = [split_at, self.points - split_at][: len(solids)]
    surfaces = [s.surface(rng, count) for s, count in zip(solids, counts)]
    if scene.second:
      surfaces[0] += apart(solids[0], solids[1], scene.relation, rng)
    tints = [tint(thing.colour, count, rng) for thing, count in zip(things, counts)]
    return [cloud(np.concatenate(surfaces), np.concatenate(tints), rng, self.noise)]


def solid(thing: Thing, rng: np.random.Generator) -> Solid:
  """The solid of a thing, up to a tenth larger or smaller than its size says."""
  radius, height = (x * rng.uniform(0.9, 1.1) for x in SIZES[thing.size])
  if thing.kind == 'capsule':
    height = max(height, 2.2 * radius)
  return Solid(kind=thing.kind, radius=radius, height=height)


def apart(first: Solid, second: Solid, relation: str, rng: np.random.Generator) -> np.ndarray:
  """How far to move the first of two solids on one place [3], so that it stands where it should.

  Along the relation's axis there is a gap between them; across it they are nearly in line.
  """
  step = np.array(RELATIONS[relation], float)
  gap = rng.uniform(0.1, 0.4)
  if step[2]:
    up = second.tall + gap if step[2] > 0 else -(first.tall + gap)
    return np.array([*rng.uniform(-0.1, 0.1, 2), up])
  shift = step * (first.radius + second.radius + gap)
  across = 1 if step[0] else 0
  shift[across] = rng.uniform(-0.15, 0.15)
  return shift


def tint(colour: str, count: int, rng: np.random.Generator) -> np.ndarray:
  """Colours [count, 3] from 0 to 1 of the points of a thing, all a little different."""
  shade = np.array(COLOURS[colour]) / 255 * rng.uniform(0.85, 1.0)
  return np.clip(shade + 0.02 * rng.standard_normal((count, 3)), 0, 1)


def cloud(
  points: np.ndarray, colours: np.ndarray, rng: np.random.Generator, noise: float
) -> np.ndarray:
  """Points and colours, [P, 3] each, as [P, 6] float32 around the origin, in any order."""
  middle = (points.min(axis=0) + points.max(axis=0)) / 2
  points = (points - middle) / EXTENT + noise * rng.standard_normal(points.shape)
  both = np.concatenate([points, colours], axis=1)
  return both[rng.permutation(len(both))].astype(np.float32)
