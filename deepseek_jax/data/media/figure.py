"""Flat figures and digits, drawn with soft edges at any place and size."""

import functools

import numpy as np

COLOURS = {
  'red': (220, 40, 40),
  'green': (40, 160, 60),
  'blue': (50, 80, 220),
  'yellow': (240, 210, 40),
  'orange': (245, 140, 30),
  'purple': (140, 50, 170),
  'pink': (245, 140, 190),
  'black': (25, 25, 25),
}
"""Red, green and blue of each colour, from 0 to 255."""

SHAPES = ('circle', 'square', 'triangle', 'diamond', 'cross', 'star', 'ring')

# Rows of five bits each, the leftmost the highest.
_GLYPHS = (
  (14, 17, 19, 21, 25, 17, 14),
  (4, 12, 4, 4, 4, 4, 14),
  (14, 17, 1, 2, 4, 8, 31),
  (31, 2, 4, 2, 1, 17, 14),
  (2, 6, 10, 18, 31, 2, 2),
  (31, 16, 30, 1, 1, 17, 14),
  (6, 8, 16, 30, 17, 17, 14),
  (31, 1, 2, 4, 8, 8, 8),
  (14, 17, 17, 14, 17, 17, 14),
  (14, 17, 17, 15, 1, 2, 12),
)


@functools.cache
def glyph(digit: int) -> np.ndarray:
  """The bitmap [7, 5] float32 of a digit, 1 where there is ink."""
  rows = np.array(_GLYPHS[digit])[:, None]
  return (rows >> np.arange(4, -1, -1) & 1).astype(np.float32)


def _planes(x: np.ndarray, y: np.ndarray, degrees: list[float], offset: float) -> np.ndarray:
  """Distances beyond straight edges [K, H, W] whose normals point in K directions."""
  angles = np.radians(degrees)[:, None, None]
  return np.cos(angles) * x + np.sin(angles) * y - offset


def beyond(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """How far points [H, W] are outside a figure that fits in the unit circle; inside is negative.

  Args:
    shape: one of `SHAPES`.
    x: [H, W], to the right.
    y: [H, W], downwards.
  """
  match shape:
    case 'circle':
      return np.hypot(x, y) - 0.95
    case 'ring':
      return np.abs(np.hypot(x, y) - 0.75) - 0.22
    case 'square':
      return np.maximum(np.abs(x), np.abs(y)) - 0.8
    case 'diamond':
      return (np.abs(x) + np.abs(y) - 1) / np.sqrt(2)
    case 'triangle':
      return _planes(x, y - 0.2, [90, 210, 330], 0.55).max(axis=0)
    case 'star':
      # Inside a five-pointed star are the points within all but one of its five edges.
      return np.sort(_planes(x, y, [-90 + 72 * k for k in range(5)], 0.35), axis=0)[-2]
    case 'cross':
      long, short = np.maximum(np.abs(x), np.abs(y)) - 0.9, np.minimum(np.abs(x), np.abs(y)) - 0.3
      return np.maximum(long, short)
  raise ValueError(f'shape: found {shape!r}, expected one of {", ".join(SHAPES)}')


def blend(canvas: np.ndarray, ink: np.ndarray, colour: tuple[int, int, int]) -> None:
  """Puts a colour on a canvas [S, S, 3] float32 where there is ink [S, S], from 0 to 1."""
  canvas += ink[..., None] * (np.asarray(colour, np.float32) - canvas)


def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
  """Middles of pixels: y [S, 1] and x [1, S]."""
  middle = np.arange(side, dtype=np.float32) + 0.5
  return middle[:, None], middle[None]


def figure_ink(shape: str, side: int, centre: tuple[float, float], radius: float) -> np.ndarray:
  """How far a figure covers each pixel, [S, S] float32 from 0 to 1.

  Args:
    shape: one of `SHAPES`.
    side: S, pixels.
    centre: x and y in pixels from the upper left.
    radius: of the circle around the figure, in pixels.
  """
  y, x = _grid(side)
  outside = beyond(shape, (x - centre[0]) / radius, (y - centre[1]) / radius)
  return np.clip(0.5 - outside * radius, 0, 1)


def bitmap_ink(
  bitmap: np.ndarray, side: int, centre: tuple[float, float], height: float
) -> np.ndarray:
  """A bitmap [h, w] from 0 to 1, smoothly enlarged to `height` pixels: [S, S] float32.

  Args:
    bitmap: the ink.
    side: S, pixels.
    centre: x and y in pixels from the upper left.
    height: pixels.
  """
  y, x = _grid(side)
  rows, columns = bitmap.shape
  scale = rows / height
  # An empty border, so that what lies outside is empty too.
  padded = np.pad(bitmap, 2)

  def weights(place: np.ndarray, size: int) -> np.ndarray:
    place = np.clip(place, 0, size - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(size)))

  down = weights((y[:, 0] - centre[1]) * scale + rows / 2 + 1.5, rows + 4)
  across = weights((x[0] - centre[0]) * scale + columns / 2 + 1.5, columns + 4)
  return (down @ padded @ across.T).astype(np.float32)


def paper(rng: np.random.Generator, side: int, shade: tuple[int, int] = (215, 250)) -> np.ndarray:
  """An empty canvas [S, S, 3] float32 of a random even grey between two shades."""
  return np.full((side, side, 3), rng.integers(*shade), np.float32)


def pixels(canvas: np.ndarray, rng: np.random.Generator, noise: float = 3.0) -> np.ndarray:
  """A canvas of any shape as uint8, with noise of a standard deviation in shades."""
  noisy = canvas + noise * rng.standard_normal(canvas.shape, dtype=np.float32)
  return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
