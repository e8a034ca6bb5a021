"""Documents of several modalities to batches: packed rows, and the media that stand in them."""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.data.batch import Batch, MediaShape
from deepseek_jax.data.media.drawings import Drawings
from deepseek_jax.data.media.encode import KINDS, SLOT_BITS, Encoded, encoded
from deepseek_jax.data.media.mixture import AnyMedia, Mixture, Share, merge_forms
from deepseek_jax.data.media.plan import Alone, Marked, MediaPlan, Packed, media_plan
from deepseek_jax.data.media.record import Fault, Record, Records, UnreadableError
from deepseek_jax.data.media.row_writer import RowWriter
from deepseek_jax.data.pipeline import Prepared, train_batches
from deepseek_jax.data.split import SPLITS, Split
from deepseek_jax.data.tokenizer import BPE, AnyTokenizer, Tokenizer

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
  """Tokens that one medium takes the place of; the model's encoders say how many.

  Attributes:
    image: of a picture.
    video: of a clip.
    sound: of a sound.
    points: of a cloud of points.
  """

  image: int = 16
  video: int = 16
  sound: int = 16
  points: int = 16

  def __post_init__(self):
    errors = wrong_sizes(self, KINDS)
    errors += [
      f'`{kind}` is {size}; expected fewer than {2**SLOT_BITS}'
      for kind in KINDS
      if (size := getattr(self, kind)) >= 2**SLOT_BITS
    ]
    if errors:
      raise ConfigError(errors)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaCorpus:
  """Documents of text and media in any order, in rows; what is learnt is for the source to say.

  Attributes:
    source: of the documents, or several in stated shares.
    tokenizer: what makes tokens of the texts.
    slots: tokens that media take the place of.
    layout: how rows are filled: several documents or one, with all places of a medium or one.
    length: T, tokens in a row.
    batch_size: B, rows in a batch, over all hosts.
    shuffle_seed: of the order of the training rows, from 0 to 2³² - 1.
    workers: processes that make or decode media; 0 does it in threads of the run's own process.
  """

  source: AnyMedia = Drawings()
  tokenizer: AnyTokenizer = BPE()
  slots: Slots = Slots()
  layout: Packed | Marked | Alone = Packed()
  length: int = 128
  batch_size: int = 16
  shuffle_seed: int = 0
  workers: int = 0

  def __post_init__(self):
    errors = wrong_sizes(self, ('length', 'batch_size'))
    if self.workers < 0:
      errors.append(f'`workers` is {self.workers}; expected 0 or more')
    if not 0 <= self.shuffle_seed < 2**32:
      errors.append(f'`shuffle_seed` is {self.shuffle_seed}; expected 0 to {2**32 - 1}')
    if errors:
      raise ConfigError(errors)

  @property
  def shares(self) -> tuple[Share, ...]:
    """The sources with their weights."""
    if isinstance(self.source, Mixture):
      return self.source.shares
    return (Share(source=self.source),)

  @property
  def media(self) -> dict[str, MediaShape]:
    """What the media of a row are, by kind."""
    forms = merge_forms(tuple(share.source for share in self.shares), 'MediaCorpus.source')
    return {
      kind: MediaShape(
        values=(self.most(kind), *forms[kind].shape),
        slots=getattr(self.slots, kind),
        dtype=forms[kind].dtype,
      )
      for kind in KINDS
      if kind in forms
    }

  def most(self, kind: str) -> int:
    """M, media of a kind that a row has room for."""
    needed = max(share.source.holds(kind) for share in self.shares)
    return self.layout.most(kind, needed)

  def places(self, kind: str) -> int:
    """Places of a row that a medium of a kind takes."""
    return self.layout.places(getattr(self.slots, kind))

  def prepare(self, cache_dir: pathlib.Path) -> 'MediaData':
    """Reads and encodes all texts, or opens what an earlier run did; media are left for later.

    Args:
      cache_dir: folder for tokens and plans; made if needed.

    Raises:
      ConfigError: a source or the tokenizer cannot be read, or a document does not fit in a row.
    """
    tokenizer = self.tokenizer.build()
    opened = [share.source.open(cache_dir) for share in self.shares]
    slots = {kind: self.places(kind) for kind in KINDS}
    for share, records in zip(self.shares, opened):
      for split in SPLITS:
        if not records.count(split):
          raise ConfigError(f'{type(share.source).__name__}: the {split} split has no document')

    def make(split: Split, chosen: list[int], weights: list[float] | None) -> MediaSplit:
      parts = tuple(
        OpenSource(
          name=type(self.shares[k].source).__name__,
          records=opened[k],
          documents=encoded(self.shares[k].source, opened[k], split, tokenizer, slots, cache_dir),
        )
        for k in chosen
      )
      tables = [part.documents for part in parts]
      # Held-out rows do not depend on the seed: figures of two runs compare.
      seed = self.shuffle_seed if split == 'train' else 0
      plan = media_plan(tables, weights, self.length, self.layout, seed, cache_dir)
      return MediaSplit(name=split, config=self, tokenizer=tokenizer, sources=parts, plan=plan)

    everything = list(range(len(opened)))
    return MediaData(
      config=self,
      tokenizer=tokenizer,
      train=make('train', everything, [share.weight for share in self.shares]),
      heldout=make('heldout', everything, None),
      by_source=tuple(make('heldout', [k], None) for k in everything),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OpenSource:
  """A source that can be read.

  Attributes:
    name: of its kind.
    records: its documents.
    documents: those of the split as tokens.
  """

  name: str
  records: Records
  documents: Encoded


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MediaSplit:
  """Rows of a split; any can be read at any time.

  Attributes:
    name: 'train' or 'heldout'.
    config: what it was prepared from.
    tokenizer: made the tokens.
    sources: of the documents.
    plan: which document is in which row.
  """

  name: Split
  config: MediaCorpus
  tokenizer: Tokenizer
  sources: tuple[OpenSource, ...]
  plan: MediaPlan

  @property
  def length(self) -> int:
    """Places in a row."""
    return self.config.length

  @property
  def rows(self) -> int:
    """Number of rows."""
    return len(self.plan.rows) - 1

  @functools.cached_property
  def starts(self) -> np.ndarray:
    """[sources + 1] int64, number of the first document of each source."""
    counts = [len(source.documents.offsets) - 1 for source in self.sources]
    return np.concatenate([[0], np.cumsum(counts)])

  @property
  def documents(self) -> int:
    """Number of documents."""
    return int(self.starts[-1])

  @functools.cached_property
  def titles(self) -> tuple[str, ...]:
    """Name of each document, by document index."""
    return tuple(name for source in self.sources for name in source.documents.names)

  @functools.cached_property
  def _learnt(self) -> np.ndarray:
    """[P] int64, targets that are learnt of every piece."""
    result = np.zeros(len(self.plan.pieces), np.int64)
    for k, source in enumerate(self.sources):
      total = np.concatenate([[0], np.cumsum(source.documents.learnt)])
      mine = self.plan.pieces[:, 0] == k
      start, count = self.plan.pieces[mine, 1], self.plan.pieces[mine, 2]
      result[mine] = total[start + count + 1] - total[start + 1]
    return result

  @property
  def targets(self) -> int:
    """Tokens that are learnt in all rows."""
    return int(self._learnt.sum())

  @functools.cached_property
  def text_bytes(self) -> int:
    """UTF-8 bytes of what is learnt in all rows."""
    total = 0.0
    for k, source in enumerate(self.sources):
      mine = self.plan.pieces[:, 0] == k
      documents = self.plan.pieces[mine, 3]
      ends = np.concatenate([[0], np.cumsum(source.documents.learnt)])[source.documents.offsets]
      share = self._learnt[mine] / np.maximum(np.diff(ends)[documents], 1)
      total += float((source.documents.text_bytes[documents] * share).sum())
    return round(total)

  @property
  def occupancy(self) -> float:
    """Share of the places in the rows that hold a token or a part of a medium."""
    return float(self.plan.pieces[:, 2].sum() / (self.rows * self.length))

  def bits_per_byte(self, nats: float) -> float:
    """Bits per byte of learnt text from the summed negative log-likelihood of all targets."""
    return nats / np.log(2.0) / self.text_bytes

  def where(self, document: int) -> tuple[OpenSource, int]:
    """The source of a document, and its number there."""
    k = int(np.searchsorted(self.starts, document, side='right')) - 1
    return self.sources[k], document - int(self.starts[k])

  def record(self, document: int) -> Record:
    """A document by its index, with what is known of it."""
    source, index = self.where(document)
    return source.records.record(self.name, index)

  def batch(self, indices: Iterable[int]) -> Batch:
    """Some rows as a batch of NumPy arrays: [B, T], and media [B, M, …].

    A medium that can no longer be read takes its document out of the row; it is logged.

    Args:
      indices: rows, each from 0; -1 gives a row of padding only.

    Raises:
      IndexError: a row is outside the split.
    """
    indices = [int(i) for i in indices]
    writer = RowWriter(len(indices), self.length, self.config.media)
    for line, index in enumerate(indices):
      if not -1 <= index < self.rows:
        raise IndexError(f'row {index} is outside the {self.rows} rows of {self.name}')
      if index >= 0:
        for piece in self.plan.pieces[self.plan.rows[index] : self.plan.rows[index + 1]]:
          self._write(writer, line, piece.tolist())
    return writer.batch()

  def alone(self, documents: Iterable[int]) -> Batch:
    """Some documents as a batch, each at the start of a row of its own; of a long text its start.

    Args:
      documents: their indices; -1 gives a row of padding only.

    Raises:
      IndexError: a document is outside the split.
    """
    documents = [int(i) for i in documents]
    # Room for the media of one document: what attends to them attends to nothing else.
    shapes = {
      kind: dataclasses.replace(
        shape, values=(max(s.source.holds(kind) for s in self.config.shares), *shape.values[1:])
      )
      for kind, shape in self.config.media.items()
    }
    writer = RowWriter(len(documents), self.length, shapes)
    for line, document in enumerate(documents):
      if not -1 <= document < self.documents:
        raise IndexError(f'document {document} is outside the {self.documents} of {self.name}')
      if document >= 0:
        k = int(np.searchsorted(self.starts, document, side='right')) - 1
        index = document - int(self.starts[k])
        start, end = self.sources[k].documents.offsets[index : index + 2].tolist()
        self._write(writer, line, [k, start, min(end - start - 1, self.length), index])
    return writer.batch()

  def _write(self, writer: RowWriter, line: int, piece: list[int]) -> None:
    """Adds a piece of a document to a row."""
    k, start, count, document = piece
    source = self.sources[k]
    media: list[np.ndarray] = []
    if source.documents.media[document].any():
      try:
        media = source.records.render(self.name, document)
      except UnreadableError as error:
        _log.warning('%s: left out: %s', source.documents.names[document], error)
        return
    kinds = source.records.record(self.name, document).media if len(media) else ()
    table = source.documents
    end = start + count
    writer.add(
      line,
      tokens=table.tokens[start : end + 1],
      learnt=table.learnt[start + 1 : end + 1],
      places=table.places[start:end],
      media=list(zip(kinds, media, strict=True)),
      document=int(self.starts[k]) + document,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MediaData(Prepared[MediaCorpus, MediaSplit]):
  """Prepared documents of several modalities.

  Attributes:
    by_source: the held-out rows of each source alone, in the order of the shares.
  """

  by_source: tuple[MediaSplit, ...]

  @property
  def faults(self) -> tuple[Fault, ...]:
    """What was left out of all sources, and why."""
    return tuple(fault for source in self.train.sources for fault in source.records.faults)

  def train_batches(self, step: int, rows: slice | np.ndarray | None = None) -> Iterator[Batch]:
    """Endless batches of the training split from a step on; see `train_batches`."""
    return train_batches(
      self.train,
      step,
      batch_size=self.config.batch_size,
      seed=self.config.shuffle_seed,
      rows=rows,
      workers=self.config.workers,
    )

  def heldout_text(self) -> bytes:
    """The UTF-8 text that is learnt of the held-out documents, a line each."""
    texts = (
      record.learnt for source in self.heldout.sources for record in source.records.walk('heldout')
    )
    return ''.join(f'{text}\n' for text in texts).encode('utf-8')
