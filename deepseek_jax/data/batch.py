"""The one record that travels from the data pipeline to the training step."""

import jax
from flax import struct


@struct.dataclass
class Batch:
  """A batch of packed rows; every field is [B, T].

  Attributes:
    tokens: int32 input token ids; 0 where the row is padded.
    targets: int32 id of the token that follows each input token in its document.
    weights: float32 weight of each target in the loss; 0 on padding and inside prompts.
    positions: int32 place of the token in its segment, from 0.
    segments: int32 number of the packed piece in its row, from 1; 0 is padding. Attention never
      crosses segments.
    documents: int32 index of the document the token came from; -1 is padding.
  """

  tokens: jax.Array
  targets: jax.Array
  weights: jax.Array
  positions: jax.Array
  segments: jax.Array
  documents: jax.Array
