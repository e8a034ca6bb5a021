"""The arrays of a batch, filled document by document."""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from deepseek_jax.data.batch import Batch, Media, MediaShape
from deepseek_jax.data.media.encode import KINDS, SLOT_BITS


class RowWriter:
  """Fills the arrays of a batch, document by document."""

  def __init__(self, rows: int, length: int, shapes: Mapping[str, MediaShape]):
    """Makes empty rows and empty media.

    Args:
      rows: B.
      length: T.
      shapes: what the media of a row are, by kind.
    """
    shape = rows, length
    self.fields: dict[str, Any] = {
      name: np.zeros(shape, np.int32) for name in ('tokens', 'targets', 'positions', 'segments')
    }
    self.fields['weights'] = np.zeros(shape, np.float32)
    self.fields['documents'] = np.full(shape, -1, np.int32)
    self.fields['placeholders'] = np.full(shape, -1, np.int32)
    self.values = {
      kind: np.zeros((rows, *form.values), form.dtype) for kind, form in shapes.items()
    }
    self.counts = {
      kind: np.zeros((rows, form.values[0]), np.int32) for kind, form in shapes.items()
    }
    self.slots = {kind: shape.slots for kind, shape in shapes.items()}
    self.first, base = {}, 0
    for kind in KINDS:
      if kind in self.values:
        self.first[kind] = base
        base += self.counts[kind].shape[1] * self.slots[kind]
    self.ends, self.pieces = [0] * rows, [0] * rows
    self.used = [dict.fromkeys(self.values, 0) for _ in range(rows)]

  def add(
    self,
    line: int,
    *,
    tokens: np.ndarray,
    learnt: np.ndarray,
    places: np.ndarray,
    media: list[tuple[str, np.ndarray]],
    document: int,
  ) -> None:
    """Adds a piece to a row.

    Args:
      line: of the row.
      tokens: [n + 1] ids, the last of which is a target only.
      learnt: [n] bool, whether the next token is learnt.
      places: [n] int32, which slot of which medium of the document stands there; -1 is a token.
      media: kind and array of each medium of the document.
      document: its index.
    """
    count = len(places)
    here = slice(self.ends[line], self.ends[line] + count)
    self.ends[line] += count
    self.pieces[line] += 1
    fields = self.fields
    fields['tokens'][line, here], fields['targets'][line, here] = tokens[:-1], tokens[1:]
    fields['weights'][line, here] = learnt
    fields['positions'][line, here] = np.arange(count)
    fields['segments'][line, here] = self.pieces[line]
    fields['documents'][line, here] = document
    starts = [self._put(line, kind, values) for kind, values in media]
    if starts:
      number, slot = places >> SLOT_BITS, places & (2**SLOT_BITS - 1)
      index = np.array(starts)[np.maximum(number, 0)] + slot
      fields['placeholders'][line, here] = np.where(places >= 0, index, -1)

  def _put(self, line: int, kind: str, values: np.ndarray) -> int:
    """Puts a medium into the row; returns the number of its first embedding."""
    at = self.used[line][kind]
    self.used[line][kind] += 1
    self.values[kind][line, at, : len(values)] = values
    self.counts[kind][line, at] = len(values)
    return self.first[kind] + at * self.slots[kind]

  def batch(self) -> Batch:
    """The batch as it is now; without any kind of media it is one of text."""
    fields = dict(self.fields)
    if not self.values:
      fields.pop('placeholders')
      return Batch(**fields)
    # Batch is typed for the step, where its fields are JAX arrays.
    media = {k: Media(cast(Any, v), cast(Any, self.counts[k])) for k, v in self.values.items()}
    return Batch(**fields, media=media)
