"""The one record that travels from the data pipeline to the training step."""

import dataclasses
from collections.abc import Iterable
from typing import Protocol

import jax
from flax import struct

from deepseek_jax.layers.context import Media


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaShape:
  """What the media of one kind in a row are, before there are any.

  Attributes:
    values: [M, …], sizes of `Media.values` without its rows.
    slots: embeddings that a model makes of each.
    dtype: name of its dtype.
  """

  values: tuple[int, ...]
  slots: int
  dtype: str = 'uint8'


@struct.dataclass
class Batch:
  """A batch of packed rows; every field but the media is [B, T].

  Attributes:
    tokens: int32 input token ids; 0 where the row is padded.
    targets: int32 id of the token that follows each input token in its document.
    weights: float32 weight of each target in the loss; 0 on padding and inside prompts.
    positions: int32 place of the token in its segment, from 0.
    segments: int32 number of the packed piece in its row, from 1; 0 is padding. Attention never
      crosses segments.
    documents: int32 index of the document the token came from; -1 is padding.
    media: by kind, those of `layers.context.MEDIA`; None in text. A kind that no row has may be
      left out.
    placeholders: int32 which embedding of the row's media stands in the token's place: all kinds
      one after the other in the order of `MEDIA`, in each kind all its media, from 0; -1 is a
      token, `NEWLINE` and `SEPARATOR` are vectors of their own. None in text.
  """

  tokens: jax.Array
  targets: jax.Array
  weights: jax.Array
  positions: jax.Array
  segments: jax.Array
  documents: jax.Array
  media: dict[str, Media] | None = None
  placeholders: jax.Array | None = None


class Rows(Protocol):
  """One split of the data, as rows that can be read at any time."""

  @property
  def rows(self) -> int:
    """Number of rows."""

  @property
  def targets(self) -> int:
    """Targets of all rows."""

  @property
  def titles(self) -> tuple[str, ...]:
    """Name of each document, by document index."""

  def bits_per_byte(self, nats: float) -> float:
    """Bits per byte of text from the summed negative log-likelihood of all targets, in nats."""

  def batch(self, indices: Iterable[int]) -> Batch:
    """Some rows as a batch of NumPy arrays [B, T]; -1 gives a row of padding only."""
