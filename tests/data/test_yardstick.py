"""The yardsticks are what their names say, and are measured once."""

import collections
import gzip
import itertools
import lzma
import math

import numpy as np
import pytest

from deepseek_jax.data import yardstick
from deepseek_jax.data.pipeline import TextCorpus
from deepseek_jax.data.source import Embedded, TextFiles
from deepseek_jax.data.tokenizer import Bytes

NAMES = ['gzip -9', 'xz -9e', 'unigram', 'bigram (interpolated)', 'Kneser–Ney 5-gram']


def make_tokens(seed, documents, vocab=9):
  """Documents of random words from 2; eos is 1, bos 0."""
  generator = np.random.default_rng(seed)
  parts = [
    [0, *generator.geometric(0.4, generator.integers(1, 30)).clip(1, vocab - 3) + 1, 1]
    for _ in range(documents)
  ]
  return np.concatenate(parts).astype(np.uint16)


def pairs(tokens):
  """(token before, token) of each target."""
  return [(int(a), int(b)) for a, b in itertools.pairwise(tokens) if b != 0]


def slow_bigram(train, wanted, weight, vocab):
  """P of each wanted pair, from dictionaries."""
  words, couples, before = collections.Counter(), collections.Counter(), collections.Counter()
  for a, b in train:
    words[b] += 1
    couples[a, b] += 1
    before[a] += 1
  total = sum(words.values()) + 0.5 * vocab
  result = []
  for a, b in wanted:
    lower = (words[b] + 0.5) / total
    own = couples[a, b] / before[a] if before[a] else lower
    result.append(weight * own + (1 - weight) * lower)
  return np.array(result)


def test_unigram():
  """Frequencies of targets, half a count added to every id."""
  train, heldout = make_tokens(0, 20), make_tokens(1, 5)
  found = yardstick.unigram(train, heldout, bos=0, vocab_size=9)
  np.testing.assert_allclose(found, slow_bigram(pairs(train), pairs(heldout), 0.0, 9))


@pytest.mark.parametrize('documents', [1, 3, 40])
def test_bigram_weight_is_the_best_on_text_kept_apart(documents):
  """The fitted weight maximises the likelihood there; nothing held out is looked at."""
  train, heldout = make_tokens(2, documents), make_tokens(3, 6)
  found = yardstick.bigram(train, heldout, bos=0, vocab_size=9)
  if documents >= 10:
    number = np.cumsum(train == 0)
    kept, fit = pairs(train[number % 10 != 0]), pairs(train[number % 10 == 0])
  else:
    every = pairs(train)
    cut = max(len(every) // 10, 1)
    kept, fit = every[:-cut], every[-cut:]
  weights = np.linspace(0.001, 0.999, 999)
  likelihoods = [np.log(slow_bigram(kept, fit, w, 9)).sum() for w in weights]
  best = weights[int(np.argmax(likelihoods))]
  expected = slow_bigram(pairs(train), pairs(heldout), best, 9)
  # The oracle tries weights a thousandth apart.
  np.testing.assert_allclose(found, expected, rtol=0.005)


def test_repeated_text_gives_no_zero():
  """Every pair was seen in what was kept apart, yet others stay possible."""
  train = np.array([0, *([2, 3] * 40), 1])
  found = yardstick.bigram(train, np.array([0, 3, 3, 4, 1]), bos=0, vocab_size=6)
  assert (found > 0).all()


@pytest.fixture
def data(tmp_path):
  """A small corpus of bytes."""
  generator = np.random.default_rng(0)
  words = ('the', 'whale', 'and', 'a', 'sea', 'of', 'truth', 'in', 'the', 'beginning')
  for i in range(60):
    text = ' '.join(generator.choice(words, 80))
    (tmp_path / f'{i:02}.txt').write_text(text, encoding='utf-8')
  source = TextFiles(str(tmp_path / '*.txt'), heldout_fraction=0.2)
  return TextCorpus(source=source, tokenizer=Bytes(), length=64).prepare(tmp_path / 'cache')


def test_small_corpus(data, tmp_path, monkeypatch):
  """Order of the names, figures of the compressors, models ordered by what they know."""
  found = yardstick.yardsticks(data, tmp_path / 'cache')
  assert list(found) == NAMES
  text = data.heldout_text()
  assert len(text) == data.heldout.text_bytes
  assert found['gzip -9'] == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text))
  packed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
  assert found['xz -9e'] == pytest.approx(8 * len(packed) / len(text))
  assert found['Kneser–Ney 5-gram'] < found['bigram (interpolated)'] < found['unigram'] < 8
  monkeypatch.setattr(yardstick, 'compute', None)
  assert yardstick.yardsticks(data, tmp_path / 'cache') == found


def test_uniform_model_is_log_of_the_vocabulary(data, tmp_path):
  """The scale: each target costs log2 of the vocabulary, bytes have no bos."""
  nats = data.heldout.targets * math.log(259)
  per_target = math.log2(259) * data.heldout.targets / data.heldout.text_bytes
  assert data.heldout.bits_per_byte(nats) == pytest.approx(per_target)


@pytest.mark.slow
def test_embedded_corpus(tmp_path):
  """The figures that the quickstart prints."""
  data = TextCorpus(source=Embedded()).prepare(tmp_path)
  expected = dict(zip(NAMES, (2.786, 2.431, 2.249, 1.631, 1.437)))
  assert yardstick.yardsticks(data, tmp_path) == pytest.approx(expected, abs=0.005)
