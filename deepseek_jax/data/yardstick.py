"""What plain methods reach on the same held-out text: the figures a model is read against.

Compressors see the held-out text only; the n-gram models learn from the training tokens and
predict the held-out targets of the model: every token but bos of every document, documents
separate. All are in bits per UTF-8 byte of the held-out text.
"""

import gzip
import json
import lzma
import pathlib
from typing import Any

import numpy as np

from deepseek_jax.data import store
from deepseek_jax.data.kneser_ney import KneserNey, document_places
from deepseek_jax.data.pipeline import TextData
from deepseek_jax.data.progress import say

# Raise when a figure changes its meaning, so that kept figures are not mistaken for new ones.
_VERSION = 1

# Added to each count of the unigram, so that no token has probability 0 (Krichevsky–Trofimov).
_UNIGRAM_ADDED = 0.5

# Every tenth training document is kept apart to fit the bigram's weight.
_FIT_EVERY = 10
_FIT_ROUNDS = 20
_LEAST_WEIGHT = 1e-3


def yardsticks(data: TextData, cache_dir: pathlib.Path) -> dict[str, float]:
  """Bits per byte of five plain methods on the held-out text, in this order.

  Args:
    data: the prepared text.
    cache_dir: folder that keeps the figures.

  Returns:
    'gzip -9', 'xz -9e', 'unigram', 'bigram (interpolated)', 'Kneser–Ney 5-gram' → bits per byte.
  """

  def build(scratch: pathlib.Path) -> dict[str, Any]:
    say(f'measuring the yardsticks on {data.heldout.text_bytes:,} bytes of held-out text')
    (scratch / 'yardsticks.json').write_text(json.dumps(compute(data)), encoding='utf-8')
    return {}

  parts = {
    'version': _VERSION,
    'train': data.train.cache.fingerprint,
    'heldout': data.heldout.cache.fingerprint,
  }
  entry = store.entry(cache_dir, store.key('yardsticks', parts), build)
  return json.loads((entry.path / 'yardsticks.json').read_text(encoding='utf-8'))


def compute(data: TextData) -> dict[str, float]:
  """The same figures, computed now."""
  text = data.heldout_text()
  train, heldout = np.asarray(data.train.cache.tokens), np.asarray(data.heldout.cache.tokens)
  names = {'bos': data.tokenizer.bos, 'vocab_size': data.tokenizer.vocab_size}
  model = KneserNey(train, **names, order=5)

  def per_byte(probabilities: np.ndarray) -> float:
    return data.heldout.bits_per_byte(-float(np.log(probabilities).sum()))

  return {
    'gzip -9': 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text),
    'xz -9e': 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
    'unigram': per_byte(unigram(train, heldout, **names)),
    'bigram (interpolated)': per_byte(bigram(train, heldout, **names)),
    'Kneser–Ney 5-gram': per_byte(model.probabilities(heldout)),
  }


def unigram(train: np.ndarray, tokens: np.ndarray, *, bos: int, vocab_size: int) -> np.ndarray:
  """P of each token that is not bos by its frequency in the training tokens, float64 [targets].

  Args:
    train: [N] documents to count, each starting with bos.
    tokens: [M] documents to predict.
    bos: the id that starts documents; never predicted.
    vocab_size: number of ids.
  """
  counts = np.bincount(train[train != bos], minlength=vocab_size) + _UNIGRAM_ADDED
  return (counts / counts.sum())[tokens[tokens != bos]]


def bigram(train: np.ndarray, tokens: np.ndarray, *, bos: int, vocab_size: int) -> np.ndarray:
  """P by the token before, interpolated with the unigram, float64 [targets].

  The weight of the bigram has the greatest likelihood on every tenth training document
  (the last tenth of the text if there are fewer than ten) with the counts of the rest; then all are
  counted.

  Args:
    train: [N] documents to count, each starting with bos.
    tokens: [M] documents to predict.
    bos: the id that starts documents; context only.
    vocab_size: number of ids.

  Source: Jelinek & Mercer 1980; Chen & Goodman 1998, section 2.3.
  """
  pairs, wanted = (_pairs(t, bos, vocab_size) for t in (train, tokens))
  document = np.cumsum(train == bos)[train != bos]
  apart = document % _FIT_EVERY == 0
  if not apart.any():
    apart[-max(len(apart) // _FIT_EVERY, 1) :] = True
  own, lower = _bigram_parts(pairs[~apart], pairs[apart], vocab_size)
  # The log-likelihood is concave in the weight: halve the interval where its slope changes sign.
  # Text that repeats itself must not drive the weight to 1, and unseen bigrams to probability 0.
  least, most = _LEAST_WEIGHT, 1 - _LEAST_WEIGHT
  for _ in range(_FIT_ROUNDS):
    weight = (least + most) / 2
    rising = float(np.sum((own - lower) / (weight * own + (1 - weight) * lower))) > 0
    least, most = (weight, most) if rising else (least, weight)
  own, lower = _bigram_parts(pairs, wanted, vocab_size)
  return weight * own + (1 - weight) * lower


def _bigram_parts(
  pairs: np.ndarray, wanted: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """P of the wanted pairs by bigram frequency (unigram after an unseen token), and by unigram."""
  words = np.bincount(pairs % vocab_size, minlength=vocab_size) + _UNIGRAM_ADDED
  lower = (words / words.sum())[wanted % vocab_size]
  keys, counts = np.unique(pairs, return_counts=True)
  if not len(keys):
    return lower, lower
  totals = np.bincount(keys // vocab_size, weights=counts, minlength=vocab_size)
  slot = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
  found = np.where(keys[slot] == wanted, counts[slot], 0)
  total = totals[wanted // vocab_size]
  return np.where(total > 0, found / np.maximum(total, 1), lower), lower


def _pairs(tokens: np.ndarray, bos: int, vocab_size: int) -> np.ndarray:
  """The token before · vocabulary + the token, int64, for each token that is not bos."""
  words = tokens.astype(np.int64)
  ends = np.flatnonzero(document_places(words, bos))
  return words[ends - 1] * vocab_size + words[ends]
