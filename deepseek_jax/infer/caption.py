"""Captions of pictures by a trained model, and how sure it is of the true ones."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.batch import Batch
from deepseek_jax.data.captions import CaptionSplit
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.infer.decode import (
  PlacedModel,
  Variables,
  jit_decode_step,
  prefill_context,
)
from deepseek_jax.infer.sample import Greedy, Sampler, Within
from deepseek_jax.infer.target import target_scores
from deepseek_jax.layers.context import Context
from deepseek_jax.models.decoder import Decoder


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read_pictures(
  decoder: Decoder, variables: Variables, caches: Any, batch: Batch, slots: int
) -> tuple[jax.Array, Any]:
  """Feeds what stands before the captions: bos and the places of the picture.

  Args:
    decoder: the model.
    variables: `params` and `buffers`.
    caches: empty.
    batch: rows [B, T]; what stands after the pictures is not looked at.
    slots: places of a picture, the same in every row.

  Returns:
    [B, V] float32 logits of the captions' first tokens, and the caches.
  """
  before = jnp.arange(batch.tokens.shape[1]) <= slots
  context = Context(
    tokens=jnp.where(before, batch.tokens, 0),
    positions=jnp.broadcast_to(jnp.arange(before.size, dtype=jnp.int32), batch.tokens.shape),
    segments=jnp.broadcast_to(before, batch.tokens.shape).astype(jnp.int32),
    media=batch.media,
    placeholders=batch.placeholders,
  )
  counts = jnp.full(batch.tokens.shape[:1], slots + 1, jnp.int32)
  return prefill_context(decoder, variables, caches, context, counts)


def caption(
  decoder: Decoder,
  variables: Variables,
  tokenizer: Tokenizer,
  batch: Batch,
  slots: int,
  sampler: Sampler = Greedy(),
) -> list[str]:
  """Writes a caption for the picture of every row.

  Args:
    decoder: the model.
    variables: `params` and `buffers`.
    tokenizer: of the run.
    batch: rows [B, T] whose pictures are described; their own captions are not looked at.
    slots: places of a picture.
    sampler: how a token is chosen.

  Returns:
    One text a row, of at most T - slots - 1 tokens, up to the end that the model sets.

  Raises:
    ConfigError: the rows have no pictures.
  """
  if batch.media is None:
    raise ConfigError('batch.media: found None, expected rows with pictures')
  if decoder.config.vocab > tokenizer.vocab_size:
    sampler = Within(vocab=tokenizer.vocab_size, sampler=sampler)
  rows, length = batch.tokens.shape
  model = PlacedModel(decoder, variables)
  caches = model.caches(rows, length)
  with model.on_mesh():
    logits, caches = read_pictures(decoder, variables, caches, batch, np.int32(slots))
  chosen = model.choose(sampler, logits, 0, 0)
  columns = [chosen]
  for index in range(1, length - slots - 1):
    positions = np.full(rows, slots + index, np.int32)
    logits, caches = model.call(jit_decode_step, caches, chosen, positions)
    chosen = model.choose(sampler, logits, 0, index)
    columns.append(chosen)
  texts = []
  for ids in np.stack([np.asarray(column) for column in columns], axis=1).tolist():
    end = ids.index(tokenizer.eos) if tokenizer.eos in ids else len(ids)
    texts.append(tokenizer.decode(ids[:end]))
  return texts


@functools.partial(jax.jit, static_argnums=0)
def caption_nats(decoder: Decoder, variables: Variables, batch: Batch) -> jax.Array:
  """Returns −log p of the caption of every row [B, T], with its end: [B] float32 nats."""
  _, chosen = target_scores(decoder, variables, batch)
  return -jnp.sum(chosen * batch.weights, axis=1)


def sample_captions(
  decoder: Decoder, variables: Variables, split: CaptionSplit, count: int
) -> list[dict[str, str]]:
  """Describes pictures spread evenly over a split, as training does now and then.

  Args:
    decoder: the model.
    variables: `params` and `buffers`, on the run's mesh.
    split: of the pictures.
    count: how many, at most.

  Returns:
    For each picture `image` (a data URL), `prompt` (empty), `text` (the model's caption) and
    `reference` (its own).
  """
  count = min(count, split.rows)
  chosen = [i * split.rows // count for i in range(count)]
  batch = split.batch(chosen)
  texts = caption(decoder, variables, split.tokenizer, batch, split.config.slots)
  return [
    {
      'image': split.data_url(index),
      'prompt': '',
      'text': text,
      'reference': split.records[index]['caption'],
    }
    for index, text in zip(chosen, texts)
  ]
