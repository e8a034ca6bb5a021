"""Whether a model sees: its captions with the right pictures, and with others."""

import dataclasses
from collections import Counter
from collections.abc import Sequence, Set
from typing import Any, cast

import numpy as np

from deepseek_jax.data.captions import CaptionData
from deepseek_jax.data.packed_split import heldout_batches
from deepseek_jax.infer.caption import caption, caption_nats
from deepseek_jax.infer.decode import PlacedModel, Variables
from deepseek_jax.models.decoder import Decoder

_RESAMPLES = 2000


def keywords_of(text: str) -> set[str]:
  """The keywords of a caption: what stands before its colon, between commas."""
  return {word.strip() for word in text.split(':', 1)[0].split(',')} - {''}


def keyword_f1(written: Sequence[str], true: Sequence[set[str]]) -> np.ndarray:
  """Agreement of captions with the true keywords, each from 0 to 1.

  Args:
    written: captions.
    true: keywords of each.

  Returns:
    [n] float64, 2 · |both| / (|written| + |true|) of each caption.
  """
  scores = []
  for text, wanted in zip(written, true, strict=True):
    scores.append(agreement(keywords_of(text), wanted))
  return np.array(scores)


def agreement(found: Set[str], true: Set[str]) -> float:
  """F1 of words that were found: 2 · |both| / (|found| + |true|), from 0 to 1."""
  return 2 * len(found & true) / max(len(found) + len(true), 1)


def other_pictures(drawings: Sequence[str], seed: int = 0) -> np.ndarray:
  """A permutation [n] that gives every row the picture of another drawing.

  Args:
    drawings: which drawing each row is a variant of; none has more than half of the rows.
    seed: of the permutation.
  """
  rng = np.random.default_rng(seed)
  names = np.unique(drawings, return_inverse=True)[1]
  # In no order of names: neighbours there are alike, and half a turn away all is different.
  names = rng.permutation(names.max() + 1)[names]
  order = rng.permutation(len(names))
  # Variants stand side by side; a turn by the largest group brings none back among its own.
  order = order[np.argsort(names[order], kind='stable')]
  shift = max(int(np.bincount(names).max()), len(names) // 2)
  result = np.empty(len(names), np.int64)
  result[order] = np.roll(order, shift)
  return result


def bootstrap_error(values: np.ndarray, groups: Sequence[str], weights: np.ndarray) -> float:
  """Standard error of a weighted mean whose rows come in groups that belong together.

  Args:
    values: [n] of each row, summed.
    groups: what each row belongs to; groups are drawn again with replacement, rows are not.
    weights: [n] what each row counts.
  """
  numbers = np.unique(groups, return_inverse=True)[1]
  sums, counts = np.bincount(numbers, values), np.bincount(numbers, weights)
  rng = np.random.default_rng(0)
  draws = rng.integers(0, len(sums), (_RESAMPLES, len(sums)))
  return float(np.std(sums[draws].sum(axis=1) / counts[draws].sum(axis=1)))


def best_constant(true: Sequence[Set[str]]) -> frozenset[str]:
  """The words that, said of everything, agree best with what is true of each."""
  ranked = [word for word, _ in Counter(w for words in true for w in words).most_common(12)]
  options = [frozenset(ranked[:count]) for count in range(1, len(ranked) + 1)]
  return max(options, key=lambda said: sum(agreement(said, words) for words in true))


def measure_captions(decoder: Decoder, variables: Variables, data: CaptionData) -> dict[str, Any]:
  """Measures a model on all held-out pictures.

  Args:
    decoder: the model.
    variables: its `params` and `buffers`.
    data: the run's.

  Returns:
    JSON-able figures: `nats_per_token` of the true captions given their `own` picture and a
    `shuffled` one, `keyword_f1` of greedy captions against the keywords of their `own` picture and
    of the `shuffled` one, each with `gap` and `gap_error` (standard error, bootstrap over
    drawings); `constant`, the F1 of the best single caption; counts.
  """
  split, model = data.heldout, PlacedModel(decoder, variables)
  drawings = [record['drawing'] for record in split.records]
  others = other_pictures(drawings)
  own, shuffled, targets, texts = [], [], [], []
  for batch in heldout_batches(split, data.config.batch_size):
    rows = batch.documents[:, 0]
    picked = np.where(rows >= 0, others[rows], 0)
    pictures = cast(Any, np.asarray(split.pictures)[picked][:, None])
    shown = (batch.media or {})['image']
    others_shown = dataclasses.replace(shown, values=pictures)
    strange = dataclasses.replace(batch, media={'image': others_shown})
    own.append(np.asarray(model.call(caption_nats, batch)))
    shuffled.append(np.asarray(model.call(caption_nats, strange)))
    targets.append(batch.weights.sum(axis=1))
    texts += caption(decoder, variables, data.tokenizer, batch, data.config.slots)
  count = split.rows
  right, wrong, tokens = (
    np.concatenate(x)[:count].astype(np.float64) for x in (own, shuffled, targets)
  )
  true = [set(record['keywords']) for record in split.records]
  ours = keyword_f1(texts[:count], true)
  strangers = keyword_f1([texts[i] for i in others], true)
  said = best_constant([set(record['keywords']) for record in data.train.records])
  constant = np.array([agreement(said, words) for words in true])
  ones = np.ones(count)
  return {
    'pictures': count,
    'drawings': len(set(drawings)),
    'nats_per_token': {
      'own': float(right.sum() / tokens.sum()),
      'shuffled': float(wrong.sum() / tokens.sum()),
      'gap': float((wrong - right).sum() / tokens.sum()),
      'gap_error': bootstrap_error(wrong - right, drawings, tokens),
    },
    'bits_per_byte': split.bits_per_byte(float(right.sum())),
    'keyword_f1': {
      'own': float(ours.mean()),
      'shuffled': float(strangers.mean()),
      'gap': float((ours - strangers).mean()),
      'gap_error': bootstrap_error(ours - strangers, drawings, ones),
      'constant': float(constant.mean()),
    },
  }
