"""Documents that are made from their numbers, the same everywhere, and held out by content."""

import abc
import dataclasses
import hashlib
import pathlib
import zlib
from collections.abc import Iterator

import numpy as np

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.data.media.record import Fault, Form, Part, Record
from deepseek_jax.data.split import SPLITS, Split, place_of

# Raise it when what a number makes changes: caches of texts are kept by it.
_VERSION = 1
_TRIES = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
  """How many documents are made, and which are held out.

  A document is held out when the hash of its description says so: nothing that is described in one
  split is ever described in the other, however many are made.

  Attributes:
    train: documents to learn from.
    heldout: documents to measure on.
    heldout_fraction: share of all possible descriptions that is held out.
    seed: of the documents to learn from; those held out are the same for every seed.
  """

  train: int = 20_000
  heldout: int = 500
  heldout_fraction: float = 0.1
  seed: int = 0

  def __post_init__(self):
    errors = wrong_sizes(self, ('train', 'heldout'))
    if not 0 < self.heldout_fraction < 1:
      errors.append(
        f'`heldout_fraction` is {self.heldout_fraction}; expected between 0 and 1, neither of them'
      )
    if self.seed < 0:
      errors.append(f'`seed` is {self.seed}; expected 0 or more')
    if errors:
      raise ConfigError(errors)

  def count(self, split: Split) -> int:
    """Number of documents of a split."""
    return self.train if split == 'train' else self.heldout


class Maker[S](abc.ABC):
  """A source that makes documents: draws a scene, describes it, paints it.

  A scene is all that a description says of a document. What it does not say (noise, exact places,
  loudness) is left to `paint`.
  """

  made: Made

  @property
  @abc.abstractmethod
  def forms(self) -> dict[str, Form]:
    """Modalities and their arrays."""

  @abc.abstractmethod
  def draw(self, rng: np.random.Generator) -> S:
    """Draws a scene."""

  @abc.abstractmethod
  def content(self, scene: S) -> str:
    """What decides whether a scene is held out: its description in one and only one way."""

  @abc.abstractmethod
  def parts(self, scene: S) -> tuple[Part, ...]:
    """Texts and media of its document."""

  @abc.abstractmethod
  def facts(self, scene: S) -> dict:
    """What can be measured against; JSON-able."""

  @abc.abstractmethod
  def paint(self, scene: S, rng: np.random.Generator, split: Split) -> list[np.ndarray]:
    """The media, in order."""

  def fingerprint(self) -> str:
    """Hexadecimal hash of the config and of the version of the makers."""
    return hashlib.sha256(f'made {_VERSION} {self!r}'.encode()).hexdigest()

  def holds(self, kind: str) -> int:
    """Media of a kind that a document has: one of each that there is."""
    return int(kind in self.forms)

  def open(self, cache_dir: pathlib.Path | None = None) -> 'MadeRecords[S]':
    """Makes the documents readable; nothing is written."""
    del cache_dir
    return MadeRecords(source=self)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MadeRecords[S]:
  """Documents that are made when they are read.

  Attributes:
    source: makes them.
  """

  source: Maker[S]

  @property
  def faults(self) -> tuple[Fault, ...]:
    """None: nothing is read that could be broken."""
    return ()

  def count(self, split: Split) -> int:
    """Number of documents of a split."""
    return self.source.made.count(split)

  def scene(self, split: Split, index: int) -> tuple[S, np.random.Generator]:
    """The scene of a document, and the generator with which to go on.

    Raises:
      IndexError: there is no such document.
      ConfigError: no scene that can be drawn is in the split.
    """
    source = self.source
    if not 0 <= index < self.count(split):
      raise IndexError(f'document {index} is outside the {self.count(split)} of {split}')
    seed = source.made.seed if split == 'train' else 0
    salt = zlib.crc32(type(source).__name__.encode())
    rng = np.random.default_rng((SPLITS.index(split), seed, salt, index))
    for _ in range(_TRIES):
      scene = source.draw(rng)
      held = place_of(source.content(scene)) < source.made.heldout_fraction
      if held == (split == 'heldout'):
        return scene, rng
    raise ConfigError(
      f'{type(source).__name__}: none of {_TRIES} scenes is in the {split} split; '
      f'made.heldout_fraction is {source.made.heldout_fraction}'
    )

  def record(self, split: Split, index: int) -> Record:
    """One document without its media."""
    scene, _ = self.scene(split, index)
    return Record(
      name=f'{type(self.source).__name__} {index}',
      parts=self.source.parts(scene),
      facts=self.source.facts(scene),
    )

  def walk(self, split: Split) -> Iterator[Record]:
    """All documents of a split, in order."""
    return (self.record(split, index) for index in range(self.count(split)))

  def render(self, split: Split, index: int) -> list[np.ndarray]:
    """The media of a document."""
    scene, rng = self.scene(split, index)
    return self.source.paint(scene, rng, split)


def article(noun: str) -> str:
  """The noun with its article: 'a cone', 'an orange cone'."""
  return f'{"an" if noun[0] in "aeiou" else "a"} {noun}'


def pick[T](rng: np.random.Generator, options: tuple[T, ...]) -> T:
  """One of several, all equally likely."""
  return options[int(rng.integers(len(options)))]


def pick_distinct[T](rng: np.random.Generator, options: tuple[T, ...], count: int) -> list[T]:
  """Several different ones, in any order."""
  return [options[i] for i in rng.permutation(len(options))[:count]]


NUMBERS = tuple('zero one two three four five six seven eight nine ten eleven twelve'.split())
"""Names of the numbers from 0 to 12."""
