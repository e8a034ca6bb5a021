"""Short clips of things that move, and what moves where."""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.data.media.figure import (
  COLOURS,
  SHAPES,
  bitmap_ink,
  blend,
  figure_ink,
  glyph,
  paper,
  pixels,
)
from deepseek_jax.data.media.made import Made, Maker, article, pick
from deepseek_jax.data.media.optional import need
from deepseek_jax.data.media.record import Form, Learnt, Medium, Part
from deepseek_jax.data.split import Split

MOTIONS = ('left', 'right', 'up', 'down', 'in a circle', 'back and forth')
SPEEDS = {'slowly': 0.22, 'quickly': 0.55}
"""How far a thing moves within a clip, in sides of the picture."""


class Mover(NamedTuple):
  """A thing and what it does.

  Attributes:
    thing: what it looks like, in words.
    motion: one of `MOTIONS`, or '' for standing still.
    speed: one of `SPEEDS`, or ''.
  """

  thing: str
  motion: str
  speed: str

  @property
  def sentence(self) -> str:
    """What it does: 'a red circle moves quickly to the left'."""
    if not self.motion:
      return f'{self.thing} stays still'
    to = 'to the ' if self.motion in ('left', 'right') else ''
    return f'{self.thing} moves {self.speed} {to}{self.motion}'

  @property
  def keywords(self) -> list[str]:
    """The words that tell it from others."""
    words = self.thing.split()[1:]
    return [
      *(w for w in words if w != 'digit'),
      self.motion or 'still',
      *filter(None, [self.speed]),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
  """Coloured figures on light paper: circle, square, triangle, diamond, cross, star, ring."""

  @property
  def things(self) -> tuple[str, ...]:
    """What there is, in words."""
    return tuple(article(f'{c} {s}') for c, s in itertools.product(COLOURS, SHAPES))

  def paper(self, rng: np.random.Generator, side: int) -> np.ndarray:
    """An empty canvas [S, S, 3] float32."""
    return paper(rng, side)

  def inks(
    self, thing: str, rng: np.random.Generator, side: int, split: Split
  ) -> tuple[Any, tuple[int, int, int]]:
    """A function from a place to the ink [S, S] there, and the colour."""
    del rng, split
    _, colour, shape = thing.split()
    return lambda centre: figure_ink(shape, side, centre, side / 7), COLOURS[colour]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FontDigits:
  """Light digits of one font on dark paper."""

  @property
  def things(self) -> tuple[str, ...]:
    """What there is, in words."""
    return tuple(f'the digit {digit}' for digit in range(10))

  def paper(self, rng: np.random.Generator, side: int) -> np.ndarray:
    """An empty canvas [S, S, 3] float32."""
    return paper(rng, side, (5, 40))

  def inks(
    self, thing: str, rng: np.random.Generator, side: int, split: Split
  ) -> tuple[Any, tuple[int, int, int]]:
    """A function from a place to the ink [S, S] there, and the colour."""
    bitmap = self.bitmap(int(thing[-1]), rng, split)
    light = int(rng.integers(180, 256))
    return lambda centre: bitmap_ink(bitmap, side, centre, side / 3.2), (light, light, light)

  def bitmap(self, digit: int, rng: np.random.Generator, split: Split) -> np.ndarray:
    """The ink of a digit [7, 5], from 0 to 1."""
    del rng, split
    return glyph(digit)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HandwrittenDigits(FontDigits):
  """The 1,797 handwritten digits of scikit-learn (extra `media`), every tenth of them held out."""

  def bitmap(self, digit: int, rng: np.random.Generator, split: Split) -> np.ndarray:
    """The ink of some writer's digit [8, 8], from 0 to 1."""
    images, labels = handwritten()
    numbers = np.flatnonzero(labels == digit)
    held = numbers % 10 == 0
    return images[rng.choice(numbers[held if split == 'heldout' else ~held])]


@functools.cache
def handwritten() -> tuple[np.ndarray, np.ndarray]:
  """Digits [1797, 8, 8] float32 from 0 to 1, and what each is [1797].

  Raises:
    ConfigError: scikit-learn is not installed.
  """
  need('sklearn', 'HandwrittenDigits')
  from sklearn.datasets import load_digits

  data = load_digits()
  return (data.images / 16).astype(np.float32), data.target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clips(Maker[tuple[Mover, ...]]):
  """Clips of one thing or several that move or stand still, with captions that say which does what.

  Attributes:
    looks: what moves.
    movers: things in a clip, at most; every number from 1 is equally frequent.
    frames: F, pictures of a clip.
    side: S, pixels of a side of a picture.
    made: how many clips, and which are held out.
  """

  looks: Figures | FontDigits | HandwrittenDigits = Figures()
  movers: int = 2
  frames: int = 8
  side: int = 32
  made: Made = Made()

  def __post_init__(self):
    errors = wrong_sizes(self, ('movers',))
    if self.movers > 4:
      errors.append(
        f'`movers` is {self.movers}; expected 4 or fewer, since more would hide each other'
      )
    if self.frames < 2:
      errors.append(f'`frames` is {self.frames}; expected 2 or more, since one does not move')
    if self.side < 16:
      errors.append(f'`side` is {self.side}; expected 16 pixels or more')
    if errors:
      raise ConfigError(errors)

  @property
  def forms(self) -> dict[str, Form]:
    """Clips [F, S, S, 3] uint8."""
    return {'video': Form(shape=(self.frames, self.side, self.side, 3), dtype='uint8')}

  def draw(self, rng: np.random.Generator) -> tuple[Mover, ...]:
    """Draws what moves where; things of a clip differ."""
    things = self.looks.things
    count = 1 + int(rng.integers(self.movers))
    chosen = rng.choice(len(things), count, replace=False)
    scene = []
    for thing in sorted(chosen.tolist()):
      motion = pick(rng, ('', *MOTIONS))
      scene.append(Mover(things[thing], motion, pick(rng, tuple(SPEEDS)) if motion else ''))
    return tuple(scene)

  def content(self, scene: tuple[Mover, ...]) -> str:
    """The caption: things are always named in the same order."""
    return ' and '.join(mover.sentence for mover in scene)

  def parts(self, scene: tuple[Mover, ...]) -> tuple[Part, ...]:
    """The clip, then its caption."""
    return Medium(modality='video'), Learnt(text=self.content(scene))

  def facts(self, scene: tuple[Mover, ...]) -> dict:
    """The keywords of the caption."""
    words = [word for mover in scene for word in mover.keywords]
    return {'keywords': list(dict.fromkeys(words))}

  def paint(
    self, scene: tuple[Mover, ...], rng: np.random.Generator, split: Split
  ) -> list[np.ndarray]:
    """The clip [F, S, S, 3] uint8."""
    background = self.looks.paper(rng, self.side)
    clip = np.repeat(background[None], self.frames, axis=0)
    for mover in scene:
      ink, colour = self.looks.inks(mover.thing, rng, self.side, split)
      for frame, place in zip(clip, path(mover, rng, self.frames)):
        blend(frame, ink((place[0] * self.side, place[1] * self.side)), colour)
    return [pixels(clip, rng)]


def path(mover: Mover, rng: np.random.Generator, frames: int) -> np.ndarray:
  """Where a thing is in every frame, [F, 2]: x and y, in sides of the picture.

  The whole path is inside the picture, so that speed and direction can always be seen.
  """
  margin = 0.16
  time = np.linspace(0, 1, frames)
  zero = np.zeros(frames)
  far = SPEEDS.get(mover.speed, 0.0)
  match mover.motion:
    case 'left' | 'right':
      shift = np.stack([time * far * (1 if mover.motion == 'right' else -1), zero], axis=1)
    case 'up' | 'down':
      shift = np.stack([zero, time * far * (1 if mover.motion == 'down' else -1)], axis=1)
    case 'in a circle':
      # Quickly is one turn and a bit, slowly less than half a turn, of equal radius.
      angle = 2 * np.pi * (2 * far * time + rng.random())
      shift = 0.25 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    case 'back and forth':
      turns = 1 if mover.speed == 'slowly' else 2
      swing = 0.22 * np.sin(2 * np.pi * turns * time)
      shift = np.stack([swing, zero], axis=1) if rng.random() < 0.5 else np.stack([zero, swing], 1)
    case _:
      shift = np.stack([zero, zero], axis=1)
  low, high = margin - shift.min(axis=0), 1 - margin - shift.max(axis=0)
  return low + rng.random(2) * (high - low) + shift
