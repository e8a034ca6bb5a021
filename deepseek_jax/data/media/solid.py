"""Points spread evenly over the surfaces of simple solids."""

import dataclasses

import numpy as np


def _turn(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Cosine and sine of random angles, [count] each."""
  angle = rng.uniform(0, 2 * np.pi, count)
  return np.cos(angle), np.sin(angle)


def _disc(rng: np.random.Generator, count: int, radius: float, height: float) -> np.ndarray:
  """Points [count, 3] of a level disc."""
  cosine, sine = _turn(rng, count)
  distance = radius * np.sqrt(rng.random(count))
  return np.stack([distance * cosine, distance * sine, np.full(count, height)], axis=1)


def _pieces(rng: np.random.Generator, count: int, areas: list[float]) -> np.ndarray:
  """How many of `count` points fall on each piece of a surface, by area."""
  return rng.multinomial(count, np.array(areas) / sum(areas))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solid:
  """A solid that stands upright on the origin's level, its axis through it.

  Attributes:
    kind: one of `SOLIDS`.
    radius: half of its width.
    height: from bottom to top; of a sphere and a torus it follows from the radius.
  """

  kind: str
  radius: float
  height: float

  def __post_init__(self):
    if self.kind not in SOLIDS:
      raise ValueError(f'kind: found {self.kind!r}, expected one of {", ".join(SOLIDS)}')
    if self.kind == 'capsule' and self.height < 2 * self.radius:
      raise ValueError(f'height: found {self.height}, less than the two ends of a capsule')

  @property
  def tall(self) -> float:
    """From bottom to top."""
    if self.kind == 'sphere':
      return 2 * self.radius
    # The tube of a torus is a quarter of its outer radius.
    return self.radius / 2 if self.kind == 'torus' else self.height

  def surface(self, rng: np.random.Generator, count: int) -> np.ndarray:
    """Points [count, 3] float64 of its surface, each part as densely as any other."""
    points = _SAMPLERS[self.kind](rng, count, self.radius, self.height)
    return points[rng.permutation(count)]


def _sphere(rng: np.random.Generator, count: int, radius: float, height: float) -> np.ndarray:
  del height
  direction = rng.standard_normal((count, 3))
  direction /= np.linalg.norm(direction, axis=1, keepdims=True)
  return radius * direction + [0, 0, radius]


def _box(rng: np.random.Generator, count: int, radius: float, height: float) -> np.ndarray:
  half = np.array([radius, radius, height / 2])
  areas = [half[1] * half[2], half[0] * half[2], half[0] * half[1]]
  axis = np.repeat(np.arange(3), _pieces(rng, count, areas))
  points = rng.uniform(-1, 1, (count, 3))
  points[np.arange(count), axis] = rng.choice([-1.0, 1.0], count)
  return points * half + [0, 0, height / 2]


def _cylinder(rng: np.random.Generator, count: int, radius: float, height: float) -> np.ndarray:
  side, top, bottom = _pieces(rng, count, [2 * height, radius, radius])
  cosine, sine = _turn(rng, side)
  wall = np.stack([radius * cosine, radius * sine, rng.uniform(0, height, side)], axis=1)
  return np.concatenate([wall, _disc(rng, top, radius, height), _disc(rng, bottom, radius, 0.0)])


def _cone(rng: np.random.Generator, count: int, radius: float, height: float) -> np.ndarray:
  side, bottom = _pieces(rng, count, [np.hypot(radius, height), radius])
  cosine, sine = _turn(rng, side)
  # The wall unrolls into a sector of a disc, on which the share within a distance is its square.
  wide = np.sqrt(rng.random(side))
  wall = np.stack([radius * wide * cosine, radius * wide * sine, height * (1 - wide)], axis=1)
  return np.concatenate([wall, _disc(rng, bottom, radius, 0.0)])


def _torus(rng: np.random.Generator, count: int, radius: float, height: float) -> np.ndarray:
  del height
  tube, ring = radius / 4, 3 * radius / 4
  # The outside of the tube has more surface than its inside: angles there are kept more often.
  angle = np.empty(0)
  while len(angle) < count:
    drawn = rng.uniform(0, 2 * np.pi, 2 * count)
    kept = rng.random(2 * count) < (ring + tube * np.cos(drawn)) / (ring + tube)
    angle = np.concatenate([angle, drawn[kept]])
  angle = angle[:count]
  cosine, sine = _turn(rng, count)
  far = ring + tube * np.cos(angle)
  return np.stack([far * cosine, far * sine, tube * (1 + np.sin(angle))], axis=1)


def _capsule(rng: np.random.Generator, count: int, radius: float, height: float) -> np.ndarray:
  straight = height - 2 * radius
  side, ends = _pieces(rng, count, [straight, 2 * radius])
  cosine, sine = _turn(rng, side)
  wall = np.stack([radius * cosine, radius * sine, rng.uniform(0, straight, side)], axis=1)
  ball = _sphere(rng, ends, radius, 0.0) - [0, 0, radius]
  ball[:, 2] += np.where(ball[:, 2] > 0, straight, 0.0)
  return np.concatenate([wall, ball]) + [0, 0, radius]


_SAMPLERS = {
  'box': _box,
  'sphere': _sphere,
  'cylinder': _cylinder,
  'cone': _cone,
  'torus': _torus,
  'capsule': _capsule,
}

SOLIDS = tuple(_SAMPLERS)
