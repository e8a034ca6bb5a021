"""Several sources in stated shares, and documents put together from several sources."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator

import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.media.clip import Clips
from deepseek_jax.data.media.cloud import Clouds
from deepseek_jax.data.media.drawings import Drawings, Passages
from deepseek_jax.data.media.folder import MediaFolder
from deepseek_jax.data.media.question import Questions
from deepseek_jax.data.media.record import Fault, Form, Record, Records
from deepseek_jax.data.media.scene import Scenes
from deepseek_jax.data.media.shards import ParquetFiles, TarShards
from deepseek_jax.data.media.sound import Sounds
from deepseek_jax.data.media.speech import Speech
from deepseek_jax.data.split import Split

Single = (
  Drawings
  | Passages
  | Scenes
  | Questions
  | Clips
  | Sounds
  | Speech
  | Clouds
  | MediaFolder
  | TarShards
  | ParquetFiles
)


def merge_forms(sources: tuple, name: str) -> dict[str, Form]:
  """Forms of all sources; one modality has the same in all.

  Raises:
    ConfigError: two sources have different arrays of one modality.
  """
  forms: dict[str, Form] = {}
  for source in sources:
    for kind, form in source.forms.items():
      if forms.setdefault(kind, form) != form:
        raise ConfigError(
          f'{name}: {kind} is {forms[kind].dtype} {list(forms[kind].shape)} in one source and '
          f'{form.dtype} {list(form.shape)} in {type(source).__name__}; expected the same in all'
        )
  return forms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joined:
  """Documents put together: number i is the i-th of every source, one after the other.

  A row of examples, or several modalities in one document. What is held out of a source is in
  held-out documents only.

  Attributes:
    sources: two or more; the one with fewest documents says how many there are.
  """

  sources: tuple[Single, ...]

  def __post_init__(self):
    if len(self.sources) < 2:
      raise ConfigError(f'Joined.sources: expected two or more, found {len(self.sources)}')
    merge_forms(self.sources, 'Joined.sources')

  @property
  def forms(self) -> dict[str, Form]:
    """Those of all sources."""
    return merge_forms(self.sources, 'Joined.sources')

  def holds(self, kind: str) -> int:
    """Media of a kind that a document has, at most: those of all its parts."""
    return sum(source.holds(kind) for source in self.sources)

  def fingerprint(self) -> str:
    """Hexadecimal hash of those of the sources."""
    parts = ' '.join(source.fingerprint() for source in self.sources)
    return hashlib.sha256(f'joined 1 {parts}'.encode()).hexdigest()

  def open(self, cache_dir: pathlib.Path) -> 'JoinedRecords':
    """Makes the documents readable."""
    return JoinedRecords(sources=tuple(source.open(cache_dir) for source in self.sources))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class JoinedRecords:
  """Documents of several sources, one after the other in one document.

  Attributes:
    sources: their documents.
  """

  sources: tuple[Records, ...]

  @property
  def faults(self) -> tuple[Fault, ...]:
    """Those of all sources."""
    return tuple(fault for source in self.sources for fault in source.faults)

  def count(self, split: Split) -> int:
    """Number of documents: of the source that has fewest."""
    return min(source.count(split) for source in self.sources)

  def record(self, split: Split, index: int) -> Record:
    """One document; its facts are those of its parts."""
    if not 0 <= index < self.count(split):
      raise IndexError(f'document {index} is outside the {self.count(split)} of {split}')
    return _join([source.record(split, index) for source in self.sources])

  def walk(self, split: Split) -> Iterator[Record]:
    """All documents of a split, in order."""
    for records in zip(*(source.walk(split) for source in self.sources)):
      yield _join(records)

  def render(self, split: Split, index: int) -> list[np.ndarray]:
    """The media of all parts, in order."""
    return [medium for source in self.sources for medium in source.render(split, index)]


def _join(records) -> Record:
  return Record(
    name=' + '.join(record.name for record in records),
    parts=tuple(part for record in records for part in record.parts),
    facts={'joined': [record.facts for record in records]},
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
  """A source and how much of a mixture it is.

  Attributes:
    source: of the documents.
    weight: share of the documents, up to a factor; a text longer than a row counts as the pieces it
      is cut into.
  """

  source: Single | Joined
  weight: float = 1.0

  def __post_init__(self):
    if not 0 < self.weight < float('inf'):
      raise ConfigError(f'Share.weight: expected above 0, found {self.weight}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
  """Documents of several sources in stated shares.

  Training rows have the shares; held-out documents all come once, whatever their source.

  Attributes:
    shares: sources and weights.
  """

  shares: tuple[Share, ...]

  def __post_init__(self):
    if not self.shares:
      raise ConfigError('Mixture.shares: expected at least one source, found none')
    merge_forms(tuple(share.source for share in self.shares), 'Mixture.shares')


AnyMedia = Single | Joined | Mixture
