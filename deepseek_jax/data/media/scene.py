"""Pictures of a few figures on a grid: what is where, and how it is drawn and described."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.media.figure import COLOURS, SHAPES, blend, figure_ink, paper, pixels
from deepseek_jax.data.media.made import Made, Maker, article, pick
from deepseek_jax.data.media.record import Form, Learnt, Medium, Part
from deepseek_jax.data.split import Split

PLACES = (
  'top left',
  'top middle',
  'top right',
  'middle left',
  'centre',
  'middle right',
  'bottom left',
  'bottom middle',
  'bottom right',
)
"""Names of the nine cells of a picture, row by row."""

SIZES = {'small': 0.55, 'large': 0.92}
"""Radius of a figure, in halves of a cell."""


class Figure(NamedTuple):
  """A figure in a cell.

  Attributes:
    cell: number of its place in `PLACES`.
    size: one of `SIZES`.
    colour: one of `COLOURS`.
    shape: one of `SHAPES`.
  """

  cell: int
  size: str
  colour: str
  shape: str

  @property
  def row(self) -> int:
    """From 0, the top."""
    return self.cell // 3

  @property
  def column(self) -> int:
    """From 0, the left."""
    return self.cell % 3

  @property
  def words(self) -> str:
    """What it is and where: 'a small red circle at the top left'."""
    where = 'in the centre' if self.cell == 4 else f'at the {PLACES[self.cell]}'
    return f'{article(f"{self.size} {self.colour} {self.shape}")} {where}'


def describe(figures: Sequence[Figure]) -> str:
  """All figures, in the order of their cells; no two scenes have the same description."""
  return ', '.join(figure.words for figure in sorted(figures))


def random_figure(rng: np.random.Generator, cell: int) -> Figure:
  """Draws a figure for a cell."""
  return Figure(cell, pick(rng, tuple(SIZES)), pick(rng, tuple(COLOURS)), pick(rng, SHAPES))


def draw_picture(figures: Sequence[Figure], side: int, rng: np.random.Generator) -> np.ndarray:
  """A picture [S, S, 3] uint8; every figure is near the middle of its cell, within it."""
  canvas = paper(rng, side)
  half = side / 6
  for figure in figures:
    radius = SIZES[figure.size] * half * rng.uniform(0.95, 1.05)
    slack = max(0.0, half - radius)
    x, y = (half * (2 * k + 1) + rng.uniform(-slack, slack) for k in (figure.column, figure.row))
    blend(canvas, figure_ink(figure.shape, side, (x, y), radius), COLOURS[figure.colour])
  return pixels(canvas, rng)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenes(Maker[tuple[Figure, ...]]):
  """Pictures of a few figures, with captions that say of each what and where it is.

  Attributes:
    least: figures in a picture, at least.
    most: at most, up to nine.
    side: S, pixels of a side.
    made: how many pictures, and which are held out.
  """

  least: int = 1
  most: int = 3
  side: int = 64
  made: Made = Made()

  def __post_init__(self):
    errors = []
    if not 1 <= self.least <= self.most <= len(PLACES):
      errors.append(
        f'`least` and `most` are {self.least} and {self.most}; expected 1 to {len(PLACES)} and not '
        'less than `least`'
      )
    if self.side < 30:
      errors.append(f'`side` is {self.side}; expected 30 pixels or more')
    if errors:
      raise ConfigError(errors)

  @property
  def forms(self) -> dict[str, Form]:
    """Pictures [S, S, 3] uint8."""
    return {'image': Form(shape=(self.side, self.side, 3), dtype='uint8')}

  def draw(self, rng: np.random.Generator) -> tuple[Figure, ...]:
    """Draws figures, one a cell at most."""
    count = int(rng.integers(self.least, self.most + 1))
    cells = sorted(rng.choice(len(PLACES), count, replace=False).tolist())
    return tuple(random_figure(rng, cell) for cell in cells)

  def content(self, scene: tuple[Figure, ...]) -> str:
    """The caption."""
    return describe(scene)

  def parts(self, scene: tuple[Figure, ...]) -> tuple[Part, ...]:
    """The picture, then its caption."""
    return Medium(modality='image'), Learnt(text=describe(scene))

  def facts(self, scene: tuple[Figure, ...]) -> dict:
    """The keywords of the caption: words of the figures, and places."""
    words = [w for f in scene for w in (f.size, f.colour, f.shape, PLACES[f.cell])]
    return {'keywords': list(dict.fromkeys(words))}

  def paint(
    self, scene: tuple[Figure, ...], rng: np.random.Generator, split: Split
  ) -> list[np.ndarray]:
    """The picture [S, S, 3] uint8."""
    del split
    return [draw_picture(scene, self.side, rng)]
