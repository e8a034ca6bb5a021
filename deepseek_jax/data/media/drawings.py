"""What else is in the package, as documents: captioned drawings, and text."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from deepseek_jax.data.drawing import OpenClipart
from deepseek_jax.data.media.record import Fault, Form, Given, Learnt, Medium, Record
from deepseek_jax.data.source import AnySource, Embedded
from deepseek_jax.data.split import Split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawings:
  """The public-domain drawings in the package with their captions; the split is by drawing.

  Attributes:
    source: which drawings.
  """

  source: OpenClipart = OpenClipart()

  @property
  def forms(self) -> dict[str, Form]:
    """Pictures [S, S, 3] uint8."""
    return {'image': Form(shape=(self.source.side, self.source.side, 3), dtype='uint8')}

  def holds(self, kind: str) -> int:
    """Media of a kind that a document has: one picture."""
    return int(kind == 'image')

  def fingerprint(self) -> str:
    """Hexadecimal hash of the files and of what is taken from them."""
    return self.source.fingerprint()

  def open(self, cache_dir: pathlib.Path) -> 'DrawingRecords':
    """Makes the documents readable; nothing is written."""
    del cache_dir
    return DrawingRecords(source=self.source)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DrawingRecords:
  """Drawings that are decoded when they are read.

  Attributes:
    source: which.
  """

  source: OpenClipart

  def __reduce__(self):
    """Goes to another process without what it has read."""
    return functools.partial(DrawingRecords, source=self.source), ()

  @property
  def faults(self) -> tuple[Fault, ...]:
    """None: the files of the package are whole, or an error is raised."""
    return ()

  @functools.cached_property
  def _index(self) -> dict[Split, list[dict[str, Any]]]:
    return {'train': self.source.records('train'), 'heldout': self.source.records('heldout')}

  def count(self, split: Split) -> int:
    """Number of drawings."""
    return len(self._index[split])

  def record(self, split: Split, index: int) -> Record:
    """One drawing's caption and keywords."""
    found = self._index[split][index]
    parts = Medium(modality='image'), Learnt(text=found['caption'])
    facts = {'keywords': list(found['keywords']), 'drawing': found['drawing']}
    return Record(name=found['name'], parts=parts, facts=facts)

  def walk(self, split: Split) -> Iterator[Record]:
    """All documents of a split, in order."""
    return (self.record(split, index) for index in range(self.count(split)))

  def render(self, split: Split, index: int) -> list[np.ndarray]:
    """The drawing [S, S, 3] uint8."""
    return [self.source.pictures([self._index[split][index]])[0]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passages:
  """Documents of text only, to be mixed with those that have media.

  Attributes:
    source: of the text.
  """

  source: AnySource = Embedded()

  @property
  def forms(self) -> dict[str, Form]:
    """There are no media."""
    return {}

  def holds(self, kind: str) -> int:
    """Media of a kind that a document has: none."""
    del kind
    return 0

  def fingerprint(self) -> str:
    """Hexadecimal hash of the text."""
    return hashlib.sha256(f'passages 1 {self.source.fingerprint()}'.encode()).hexdigest()

  def open(self, cache_dir: pathlib.Path) -> 'PassageRecords':
    """Makes the documents readable; nothing is written."""
    del cache_dir
    return PassageRecords(source=self.source)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PassageRecords:
  """Documents of text.

  Attributes:
    source: of the text.
  """

  source: AnySource

  def __reduce__(self):
    """Goes to another process without what it has read."""
    return functools.partial(PassageRecords, source=self.source), ()

  @property
  def faults(self) -> tuple[Fault, ...]:
    """None: a text that cannot be read is an error."""
    return ()

  @functools.cached_property
  def _documents(self) -> dict[Split, list[Record]]:
    return {'train': list(self.walk('train')), 'heldout': list(self.walk('heldout'))}

  def count(self, split: Split) -> int:
    """Number of documents."""
    return len(self._documents[split])

  def record(self, split: Split, index: int) -> Record:
    """One document; the first that is asked for loads all."""
    return self._documents[split][index]

  def walk(self, split: Split) -> Iterator[Record]:
    """All documents of a split, in order, one at a time."""
    for document in self.source.documents(split):
      given = (Given(text=document.prompt),) if document.prompt else ()
      name = f'{document.source}: {document.title}'
      yield Record(name=name, parts=(*given, Learnt(text=document.text)))

  def render(self, split: Split, index: int) -> list[np.ndarray]:
    """Nothing."""
    del split, index
    return []
