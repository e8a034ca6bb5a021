"""One split of the data as packed rows, any of which can be read at any time."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, cast

import jax
import numpy as np

from deepseek_jax.data.batch import Batch, Rows
from deepseek_jax.data.cache import TokenCache
from deepseek_jax.data.packing import PackPlan


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PackedSplit:
  """Rows of packed documents; each target of each document is in exactly one place.

  Attributes:
    name: 'train' or 'heldout'.
    cache: the tokens of the documents.
    plan: where they are put.
  """

  name: str
  cache: TokenCache
  plan: PackPlan

  @property
  def length(self) -> int:
    """Places in a row."""
    return self.plan.length

  @property
  def rows(self) -> int:
    """Number of rows."""
    return len(self.plan.rows) - 1

  @property
  def documents(self) -> int:
    """Number of documents."""
    return len(self.cache.titles)

  @property
  def titles(self) -> tuple[str, ...]:
    """Name of each document, by document index."""
    return self.cache.titles

  @property
  def sources(self) -> tuple[str, ...]:
    """Source of each document, by document index."""
    return self.cache.sources

  @property
  def tokens(self) -> int:
    """Tokens of all documents, with bos and eos."""
    return len(self.cache.tokens)

  @functools.cached_property
  def targets(self) -> int:
    """Targets of all documents: every token but the first (bos) of each and those of its prompt."""
    return self.tokens - int(self.cache.given.sum())

  @property
  def prompted(self) -> bool:
    """Whether documents have prompts, which are read but not predicted."""
    return self.targets < self.tokens - self.documents

  @functools.cached_property
  def text_bytes(self) -> int:
    """UTF-8 bytes of the text of all documents, prompts left out."""
    return int(self.cache.text_bytes.sum())

  @property
  def occupancy(self) -> float:
    """Share of the places in the rows that hold a token."""
    return self.plan.occupancy

  def bits_per_byte(self, nats: float) -> float:
    """Bits per byte of text from the summed negative log-likelihood of all targets, in nats."""
    return nats / np.log(2.0) / self.text_bytes

  def row(self, index: int) -> Batch:
    """One row as a batch of [T] NumPy arrays."""
    return jax.tree.map(lambda field: field[0], self.batch([index]))

  def batch(self, indices: Iterable[int]) -> Batch:
    """Some rows as a batch of [B, T] NumPy arrays.

    Args:
      indices: rows, each from 0; -1 gives a row of padding only.

    Raises:
      IndexError: a row is outside the split.
    """
    indices = [int(i) for i in indices]
    # Views of the maps: slicing them is several times quicker than slicing np.memmap itself.
    ids, plan_rows = np.asarray(self.cache.tokens), np.asarray(self.plan.rows)
    pieces = np.asarray(self.plan.pieces)
    shape = (len(indices), self.length)
    offsets, given = np.asarray(self.cache.offsets), np.asarray(self.cache.given)
    tokens, targets, positions, segments = (np.zeros(shape, np.int32) for _ in range(4))
    weights = np.zeros(shape, np.float32)
    documents = np.full(shape, -1, np.int32)
    places = np.arange(self.length, dtype=np.int32)
    for line, index in enumerate(indices):
      if not -1 <= index < self.rows:
        raise IndexError(f'row {index} is outside the {self.rows} rows of {self.name}')
      if index < 0:
        continue
      place = 0
      row_pieces = pieces[plan_rows[index] : plan_rows[index + 1]].tolist()
      for segment, (start, count, document) in enumerate(row_pieces, start=1):
        span = slice(place, place + count)
        tokens[line, span] = ids[start : start + count]
        targets[line, span] = ids[start + 1 : start + count + 1]
        positions[line, span] = places[:count]
        segments[line, span] = segment
        documents[line, span] = document
        # Input j of a document has token j + 1 as its target.
        prompt = min(max(int(offsets[document] + given[document]) - 1 - start, 0), count)
        weights[line, place + prompt : place + count] = 1
        place += count
    # Batch is typed for the step, where its fields are JAX arrays.
    fields = {
      'tokens': tokens,
      'targets': targets,
      'weights': weights,
      'positions': positions,
      'segments': segments,
      'documents': documents,
    }
    return Batch(**cast(dict[str, Any], fields))


def heldout_batches(
  split: Rows, batch_size: int, rows: np.ndarray | None = None
) -> Iterator[Batch]:
  """All rows once and in order, as [B, T] NumPy batches; the last is filled up with padding rows.

  Args:
    split: the rows.
    batch_size: B, of every batch.
    rows: which rows of each batch to read, for one host of several; None reads all.
  """
  wanted = range(batch_size) if rows is None else rows.tolist()
  for start in range(0, split.rows, batch_size):
    indices = [start + row for row in wanted]
    yield split.batch(i if i < split.rows else -1 for i in indices)
