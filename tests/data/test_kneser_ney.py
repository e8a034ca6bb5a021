"""The vectorised n-gram model is the textbook one, and its probabilities sum to one."""

import collections

import numpy as np
import pytest

from deepseek_jax.data.kneser_ney import KneserNey, discounts, document_places

BOS = 0


def make_documents(seed, count=12, vocab=6, longest=15):
  """Short documents of few words, with some repetition; eos is 1."""
  generator = np.random.default_rng(seed)
  weights = 1.0 / np.arange(1, vocab - 1)
  words = [
    generator.choice(np.arange(2, vocab), generator.integers(0, longest), p=weights / weights.sum())
    for _ in range(count)
  ]
  return [[BOS, *map(int, document), 1] for document in words]


class SlowKneserNey:
  """Interpolated modified Kneser–Ney from dictionaries, straight from the definition."""

  def __init__(self, documents, vocab, order):
    self.vocab, self.order = vocab, order
    self.counts = [collections.Counter() for _ in range(order + 1)]
    raw = [collections.Counter() for _ in range(order + 2)]
    for document in documents:
      for end in range(1, len(document)):
        for size in range(1, min(order + 1, end + 1) + 1):
          raw[size][tuple(document[end - size + 1 : end + 1])] += 1
    for size in range(1, order + 1):
      for gram, count in raw[size].items():
        if size == order or gram[0] == BOS:
          self.counts[size][gram] = count
        else:
          self.counts[size][gram] = len({g for g in raw[size + 1] if g[1:] == gram})
    self.discounts = [None, *(self.estimate(c.values()) for c in self.counts[1:])]

  @staticmethod
  def estimate(counts):
    """The three discounts."""
    n = collections.Counter(counts)
    plain = n[1] / (n[1] + 2 * n[2]) if n[1] and n[2] else 0.5
    if all(n[k] for k in (1, 2, 3, 4)):
      found = [k - (k + 1) * plain * n[k + 1] / n[k] for k in (1, 2, 3)]
      if all(0 <= d <= k for k, d in enumerate(found, start=1)):
        return found
    return [plain] * 3

  def probability(self, word, history):
    """P(word | history), histories longer than the order being cut."""
    history = tuple(history)[-(self.order - 1) :] if self.order > 1 else ()
    lower = self.probability(word, history[1:]) if history else 1 / self.vocab
    size = len(history) + 1
    after = {g: c for g, c in self.counts[size].items() if g[:-1] == history}
    total = sum(after.values())
    if not total:
      return lower
    taken = {g: self.discounts[size][min(c, 3) - 1] for g, c in after.items()}
    gram = (*history, word)
    own = after[gram] - taken[gram] if gram in after else 0.0
    return (own + sum(taken.values()) * lower) / total


@pytest.mark.parametrize('order', [1, 2, 3, 5])
@pytest.mark.parametrize('seed', range(4))
def test_against_the_definition(order, seed):
  """Seen and unseen documents, words never seen included."""
  vocab = 6 + seed
  train = make_documents(seed, count=8 + 10 * seed, vocab=vocab - 1)
  tests = [*make_documents(50 + seed, vocab=vocab), train[0], [BOS, vocab - 1, vocab - 1, 2, 1]]
  fast = KneserNey(np.concatenate(train), bos=BOS, vocab_size=vocab, order=order)
  slow = SlowKneserNey(train, vocab, order)
  expected = [
    slow.probability(document[i], document[:i])
    for document in tests
    for i in range(1, len(document))
  ]
  found = fast.probabilities(np.concatenate(tests))
  np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize('order', [1, 2, 5])
def test_probabilities_sum_to_one(order):
  """After histories seen and unseen, short and long."""
  vocab = 7
  train = make_documents(9, count=60, vocab=vocab - 1)
  model = KneserNey(np.concatenate(train), bos=BOS, vocab_size=vocab, order=order)
  histories = [[BOS], [BOS, 2], [BOS, 6, 6], train[3][:5], train[5][:-1], [BOS, 2, 3, 2, 3, 4, 2]]
  for history in histories:
    # bos is an id like the others for the uniform floor, but it cannot stand inside a document.
    total = sum(model.probabilities(np.array([*history, word]))[-1] for word in range(1, vocab))
    floor = SlowKneserNey(train, vocab, order).probability(BOS, history)
    assert total + floor == pytest.approx(1.0, abs=1e-12)
    assert 0 < floor < 0.2


def test_documents_are_separate():
  """The order of the documents changes nothing: no n-gram crosses bos."""
  train = make_documents(3, count=30)
  tests = np.concatenate(make_documents(4))
  models = [
    KneserNey(np.concatenate(documents), bos=BOS, vocab_size=6)
    for documents in (train, train[::-1])
  ]
  np.testing.assert_array_equal(*(model.probabilities(tests) for model in models))


def test_discounts():
  """The formula, and the plain discount where the formula has no ground."""
  counts = np.repeat([0, 1, 2, 3, 4, 9], [5, 40, 15, 8, 5, 3])
  plain = 40 / 70
  expected = [0, 1 - 2 * plain * 15 / 40, 2 - 3 * plain * 8 / 15, 3 - 4 * plain * 5 / 8]
  np.testing.assert_allclose(discounts(counts), expected)
  np.testing.assert_allclose(discounts(np.array([1, 1, 2])), [0, 0.5, 0.5, 0.5])
  np.testing.assert_allclose(discounts(np.array([1, 1, 1, 2])), [0, 0.6, 0.6, 0.6])
  np.testing.assert_allclose(discounts(np.array([7, 7])), [0, 0.5, 0.5, 0.5])


def test_places():
  """From 0 at every bos."""
  places = document_places(np.array([0, 5, 5, 0, 0, 5]), 0)
  np.testing.assert_array_equal(places, [0, 1, 2, 0, 0, 1])
  with pytest.raises(ValueError, match='start with bos'):
    document_places(np.array([5, 0]), 0)
