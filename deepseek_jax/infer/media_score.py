"""Whether a model looks at what it is shown: its answers with the right media, and with others."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.data.batch import Batch
from deepseek_jax.data.media.rows import MediaData, MediaSplit, OpenSource
from deepseek_jax.data.packed_split import heldout_batches
from deepseek_jax.infer.answer import words_of, write_answers
from deepseek_jax.infer.caption_score import agreement, best_constant
from deepseek_jax.infer.decode import PlacedModel, Variables
from deepseek_jax.infer.target import context_of, shuffled_media, target_scores
from deepseek_jax.models.contrastive import Contrastive, Towers
from deepseek_jax.models.decoder import Decoder

CANDIDATES = 1000
"""Most pairs that are told apart at once."""

WRITTEN = 256
"""Most documents of a source that are answered token by token."""


class Answers(NamedTuple):
  """What a model makes of documents, D of them.

  Attributes:
    nats: [D] −log p of what is learnt.
    tokens: [D] tokens of it.
    wrong: [D] tokens that were not the likeliest; where none is, greedy decoding writes the text.
  """

  nats: np.ndarray
  tokens: np.ndarray
  wrong: np.ndarray

  @property
  def exact(self) -> float:
    """Share of the documents that greedy decoding would write to the letter."""
    there = self.tokens > 0
    return float((self.wrong[there] == 0).mean())

  @property
  def nats_per_token(self) -> float:
    """Mean nats a token."""
    return float(self.nats.sum() / self.tokens.sum())


@functools.partial(jax.jit, static_argnums=0)
def judge(decoder: Decoder, variables: Variables, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Returns −log p of every target [B, T], and whether another was likelier; 0 beside targets."""
  scores, chosen = target_scores(decoder, variables, batch)
  wrong = (jnp.argmax(scores, axis=-1) != batch.targets) * batch.weights
  return -chosen * batch.weights, wrong


def answers(
  decoder: Decoder, variables: Variables, split: MediaSplit, shuffled: bool = False
) -> Answers:
  """Judges all documents of a split.

  Args:
    decoder: the model.
    variables: its `params` and `buffers`.
    split: the documents.
    shuffled: whether each row is shown the media of another row.
  """
  model, sums = PlacedModel(decoder, variables), np.zeros((3, split.documents))
  for batch in heldout_batches(split, split.config.batch_size):
    given = shuffled_media(batch) if shuffled else batch
    nats, wrong = (np.asarray(x, np.float64) for x in model.call(judge, given))
    own = np.asarray(batch.documents)
    for line, values in enumerate((nats, np.asarray(batch.weights, np.float64), wrong)):
      np.add.at(sums[line], own[own >= 0], values[own >= 0])
  return Answers(*sums)


def measure_media(
  decoder: Decoder, variables: Variables, data: MediaData
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Measures a model on all held-out documents of every source.

  Args:
    decoder: the model.
    variables: its `params` and `buffers`.
    data: the run's.

  Returns:
    JSON-able figures by source: `documents`; `exact` and `nats_per_token` with their own media, and
    `shuffled_exact` and `shuffled_nats_per_token` with those of another row; of at most `WRITTEN`
    of them `f1`, the mean agreement of the words of greedy answers with their own text,
    `shuffled_f1`, and `constant_f1` of the words that, always said, agree best. Of two towers
    `candidates`, `recall_1`, `recall_5` (of text by media), `matching` (own text above one other).
    Then what was written: `source`, `document` (its index in the source's split), `given`, `text`,
    `shuffled_text` and `reference` of each.
  """
  found: dict[str, dict[str, Any]] = {}
  written: list[dict[str, Any]] = []
  for split, train in zip(data.by_source, data.train.sources, strict=True):
    name = split.sources[0].name
    if isinstance(decoder.config, Contrastive):
      found[name] = measure_pairs(decoder, variables, split)
      continue
    own = answers(decoder, variables, split)
    others = answers(decoder, variables, split, shuffled=True)
    rows = write(decoder, variables, split, np.flatnonzero(own.tokens > 0))
    written += [{'source': name, **row} for row in rows]
    found[name] = {
      'documents': int((own.tokens > 0).sum()),
      'exact': own.exact,
      'nats_per_token': own.nats_per_token,
      'shuffled_exact': others.exact,
      'shuffled_nats_per_token': others.nats_per_token,
      **agreements(rows, train),
    }
  return found, written


def write(
  decoder: Decoder, variables: Variables, split: MediaSplit, answered: np.ndarray
) -> list[dict[str, Any]]:
  """Answers documents token by token, the likeliest each, with their own media and with others'.

  Args:
    decoder: the model.
    variables: its `params` and `buffers`.
    split: of the documents.
    answered: [N] those of which something is learnt; at most `WRITTEN` are taken, evenly.
  """
  count = min(len(answered), WRITTEN)
  chosen = answered[np.arange(count) * len(answered) // max(count, 1)].tolist()
  texts = write_answers(decoder, variables, split, chosen)
  strange = write_answers(decoder, variables, split, chosen, shuffled=True)
  rows = []
  for document, text, other in zip(chosen, texts, strange):
    record = split.record(document)
    row = {'document': document, 'given': record.given, 'text': text, 'shuffled_text': other}
    rows.append({**row, 'reference': record.learnt})
  return rows


def agreements(rows: list[dict[str, Any]], train: OpenSource) -> dict[str, float]:
  """Returns `f1`, `shuffled_f1` and `constant_f1` of what `write` returns; see `measure_media`.

  Args:
    rows: at least one.
    train: the same source's training documents, of which the constant is made.
  """
  true = [words_of(row['reference']) for row in rows]
  records = itertools.islice(train.records.walk('train'), 4000)
  constant = best_constant([words_of(record.learnt) for record in records])

  def mean(texts: list[frozenset[str]]) -> float:
    return float(np.mean([agreement(text, own) for text, own in zip(texts, true, strict=True)]))

  return {
    'f1': mean([words_of(row['text']) for row in rows]),
    'shuffled_f1': mean([words_of(row['shuffled_text']) for row in rows]),
    'constant_f1': mean([constant] * len(rows)),
  }


@functools.partial(jax.jit, static_argnums=0)
def embed_pairs(decoder: Decoder, variables: Variables, batch: Batch) -> Towers:
  """Returns both halves of every pair of rows [B, T]."""
  found: Any = decoder.apply(variables, context_of(batch), method='pairs')
  return found


def measure_pairs(decoder: Decoder, variables: Variables, split: MediaSplit) -> dict[str, Any]:
  """Returns how often media find their text; see `measure_media`.

  Texts that are the same, word for word, are one candidate.
  """
  model, media, text = PlacedModel(decoder, variables), [], []
  for batch in heldout_batches(split, split.config.batch_size):
    towers = model.call(embed_pairs, batch)
    real = np.asarray(towers.real)
    media.append(np.asarray(towers.media)[real])
    text.append(np.asarray(towers.text)[real])
  shown, said = np.concatenate(media), np.concatenate(text)
  _, first = np.unique(said.round(5), axis=0, return_index=True)
  kept = np.sort(first)[:CANDIDATES]
  similar = shown[kept] @ said[kept].T
  own = np.diag(similar)[:, None]
  rank = (similar > own).sum(axis=1)
  count = len(kept)
  return {
    'candidates': count,
    'recall_1': float((rank < 1).mean()),
    'recall_5': float((rank < 5).mean()),
    # Against every other text, which is the mean over all choices of one.
    'matching': float((similar < own).sum() / (count * (count - 1))),
  }
