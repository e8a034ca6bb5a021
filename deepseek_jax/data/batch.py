"""The one record that travels from the data pipeline to the training step."""

from collections.abc import Iterable
from typing import Protocol

import jax
from flax import struct


@struct.dataclass
class Batch:
  """A batch of packed rows; every field but the pictures is [B, T].

  Attributes:
    tokens: int32 input token ids; 0 where the row is padded.
    targets: int32 id of the token that follows each input token in its document.
    weights: float32 weight of each target in the loss; 0 on padding and inside prompts.
    positions: int32 place of the token in its segment, from 0.
    segments: int32 number of the packed piece in its row, from 1; 0 is padding. Attention never
      crosses segments.
    documents: int32 index of the document the token came from; -1 is padding.
    images: uint8 [B, M, S, S, 3] pictures of each row, red, green, blue; None in text.
    placeholders: int32 which of the row's picture embeddings stands in the token's place, from 0;
      -1 is a token. None in text.
  """

  tokens: jax.Array
  targets: jax.Array
  weights: jax.Array
  positions: jax.Array
  segments: jax.Array
  documents: jax.Array
  images: jax.Array | None = None
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
