"""What a model writes about media that it has not seen, token by token."""

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.data.batch import Batch
from deepseek_jax.data.media.rows import MediaSplit
from deepseek_jax.infer.decode import PlacedModel, Variables, jit_decode_step, prefill_context
from deepseek_jax.infer.sample import Greedy, Sampler, Within
from deepseek_jax.infer.target import shuffled_media
from deepseek_jax.layers.context import Context
from deepseek_jax.models.decoder import Decoder

STOP_WORDS = frozenset('a an and are at in is it of on the there to with'.split())
"""Words that say nothing of what is shown."""


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read_prompts(
  decoder: Decoder, variables: Variables, caches: Any, batch: Batch, counts: jax.Array
) -> tuple[jax.Array, Any]:
  """Feeds what stands before the first learnt token of every row: media, and a question.

  Args:
    decoder: the model.
    variables: `params` and `buffers`.
    caches: empty.
    batch: rows [B, T] of one document each.
    counts: [B] int32 tokens of each row that are fed.

  Returns:
    [B, V] float32 logits of the first tokens of the answers, and the caches.
  """
  before = jnp.arange(batch.tokens.shape[1]) < counts[:, None]
  placeholders = batch.placeholders
  context = Context(
    tokens=jnp.where(before, batch.tokens, 0),
    positions=jnp.broadcast_to(jnp.arange(before.shape[1], dtype=jnp.int32), before.shape),
    segments=before.astype(jnp.int32),
    media=batch.media,
    placeholders=None if placeholders is None else jnp.where(before, placeholders, -1),
  )
  return prefill_context(decoder, variables, caches, context, counts)


def write_answers(
  decoder: Decoder,
  variables: Variables,
  split: MediaSplit,
  documents: Sequence[int],
  sampler: Sampler = Greedy(),
  shuffled: bool = False,
) -> list[str]:
  """Writes what each document is to be answered with, up to the end that the model sets.

  Args:
    decoder: the model.
    variables: `params` and `buffers`.
    split: of the documents.
    documents: their indices; what is learnt of each follows all that is given.
    sampler: how a token is chosen.
    shuffled: whether each document is shown the media of another, where one has as many.

  Returns:
    One text a document.
  """
  tokenizer = split.tokenizer
  if decoder.config.vocab > tokenizer.vocab_size:
    sampler = Within(vocab=tokenizer.vocab_size, sampler=sampler)
  model, size, texts = PlacedModel(decoder, variables), split.config.batch_size, []
  for start in range(0, len(documents), size):
    chosen = list(documents[start : start + size])
    # Every batch is of one size, so that one program does.
    batch = split.alone([*chosen, *[-1] * (size - len(chosen))])
    if shuffled:
      batch = shuffled_media(batch)
    texts += list(_write(model, batch, tokenizer.eos, sampler, len(chosen), tokenizer.decode))
  return texts


def _write(
  model: PlacedModel, batch: Batch, eos: int, sampler: Sampler, count: int, decode: Any
) -> Iterator[str]:
  learnt = np.asarray(batch.weights) > 0
  counts = np.where(learnt.any(axis=1), learnt.argmax(axis=1) + 1, 1).astype(np.int32)
  rows, length = batch.tokens.shape
  caches = model.caches(rows, length)
  logits, caches = model.call(read_prompts, caches, batch, counts)
  ids = np.full((rows, length), eos, np.int64)
  over = np.arange(rows) >= count
  for index in range(length - int(counts[:count].min())):
    token = model.choose(sampler, logits, 0, index)
    ids[:, index] = np.where(over, eos, np.asarray(token))
    over |= (ids[:, index] == eos) | (counts + index + 1 >= length)
    if over.all():
      break
    places = np.minimum(counts + index, length - 1)
    logits, caches = model.call(jit_decode_step, caches, token, places)
  for line in ids[:count].tolist():
    yield decode(line[: line.index(eos)] if eos in line else line)


def words_of(text: str) -> frozenset[str]:
  """The words of a text that say something, in small letters."""
  return frozenset(re.findall(r'\w+', text.lower())) - STOP_WORDS
