"""What a document of several modalities is: texts and media in the order in which they are read."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from deepseek_jax.data.split import Split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
  """Text that is read and not learnt: a question, an instruction.

  Attributes:
    text: the text.
  """

  text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learnt:
  """Text that is learnt: a caption, an answer.

  Attributes:
    text: the text.
  """

  text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Medium:
  """The place of a picture, a clip, a sound or a cloud of points.

  Attributes:
    modality: 'image', 'video', 'sound' or 'points'.
  """

  modality: str


Part = Given | Learnt | Medium


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """A document.

  Attributes:
    name: what it is called.
    parts: texts and media, in order.
    facts: what else is known and can be measured against, JSON-able: `keywords`, `answer`.
  """

  name: str
  parts: tuple[Part, ...]
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def learnt(self) -> str:
    """All of its text that is learnt."""
    return ''.join(part.text for part in self.parts if isinstance(part, Learnt))

  @property
  def given(self) -> str:
    """All of its text that is only read."""
    return ''.join(part.text for part in self.parts if isinstance(part, Given))

  @property
  def media(self) -> tuple[str, ...]:
    """Modality of each of its media, in order."""
    return tuple(part.modality for part in self.parts if isinstance(part, Medium))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
  """What the arrays of a modality are.

  Attributes:
    shape: of one medium: a picture [S, S, 3], a clip [F, S, S, 3], a sound [N], points [P, 6]. One
      may be shorter along the first axis: a short sound, a clip of few frames.
    dtype: name of the NumPy type: pictures and clips uint8, sounds (from -1 to 1) and points
      (x, y, z, then red, green, blue from 0 to 1) float32.
  """

  shape: tuple[int, ...]
  dtype: str

  def empty(self, *lead: int) -> np.ndarray:
    """Zeros [*lead, *shape]."""
    return np.zeros((*lead, *self.shape), self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
  """A file, or a part of one, that was left out.

  Attributes:
    name: of the file; in an archive, of the archive and its member.
    reason: why.
  """

  name: str
  reason: str


class UnreadableError(Exception):
  """A medium or its caption cannot be used; the message says why."""


class Records(Protocol):
  """Documents that can be read in any order."""

  @property
  def faults(self) -> tuple[Fault, ...]:
    """What was left out."""

  def count(self, split: Split) -> int:
    """Number of documents of a split."""

  def record(self, split: Split, index: int) -> Record:
    """One document without its media; cheap."""

  def walk(self, split: Split) -> Iterator[Record]:
    """All documents of a split, in order, without their media."""

  def render(self, split: Split, index: int) -> list[np.ndarray]:
    """The media of a document, in order.

    Raises:
      UnreadableError: one can no longer be read.
    """


class MediaSource(Protocol):
  """A config that says where documents come from."""

  @property
  def forms(self) -> dict[str, Form]:
    """Modalities that its documents may have, and what their arrays are."""

  def holds(self, kind: str) -> int:
    """Media of a kind that a document has, at most."""

  def fingerprint(self) -> str:
    """Hexadecimal hash of all that decides the texts and the order of the documents."""

  def open(self, cache_dir: pathlib.Path) -> Records:
    """Makes the documents readable.

    Args:
      cache_dir: folder for what takes long to find out; made if needed.

    Raises:
      ConfigError: what is needed is not there.
    """
