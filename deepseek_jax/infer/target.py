"""A batch as a model reads it, with media of its own or of others, and its targets."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.data.batch import Batch
from deepseek_jax.infer.decode import Variables
from deepseek_jax.layers.context import Context
from deepseek_jax.models.decoder import Decoder


def context_of(batch: Batch) -> Context:
  """Returns what layers need to know of rows [B, T] and their media."""
  return Context(
    tokens=batch.tokens,
    positions=batch.positions,
    segments=batch.segments,
    media=batch.media,
    placeholders=batch.placeholders,
  )


def target_scores(
  decoder: Decoder, variables: Variables, batch: Batch
) -> tuple[jax.Array, jax.Array]:
  """Returns log p of every token at every place of rows [B, T], and of the targets.

  Returns:
    [B, T, V] and [B, T] float32; what stands where nothing is learnt has no meaning.
  """
  context = context_of(batch)

  def forward(module: Decoder, context: Context) -> jax.Array:
    return module.logits(module(context)[0], context)

  logits: Any = decoder.apply(variables, context, method=forward)
  scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  return scores, jnp.take_along_axis(scores, batch.targets[..., None], axis=-1)[..., 0]


def shuffled_media(batch: Batch) -> Batch:
  """Returns the rows [B, T] with the media of the row before, where that has as many; B > 1."""

  def turn(media: Any) -> Any:
    counts = np.asarray(media.counts)
    order = np.arange(len(counts))
    patterns = [tuple(row > 0) for row in counts]
    for pattern in set(patterns):
      rows = np.array([i for i, own in enumerate(patterns) if own == pattern])
      order[rows] = np.roll(rows, 1)
    return jax.tree.map(lambda x: np.asarray(x)[order], media)

  assert batch.media is not None
  return dataclasses.replace(
    batch, media={kind: turn(media) for kind, media in batch.media.items()}
  )
