"""Interpolated modified Kneser–Ney n-grams over token ids, in NumPy.

An n-gram is known by the number of its prefix and its last token, so one 64-bit key serves any
order and any vocabulary. Documents are separate: n-grams never cross a bos.

Source: Chen & Goodman 1998, 'An Empirical Study of Smoothing Techniques for Language Modeling',
sections 2.7 and 3 (modified Kneser–Ney).
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Order:
  """Everything about the n-grams of one order.

  Attributes:
    keys: [U] int64 sorted, prefix number · vocabulary + last token, of each n-gram.
    discounted: [U] float64, count less discount, of each n-gram.
    totals: [contexts] float64, sum of the counts after each context; 0 if it was never seen.
    reserves: [contexts] float64, mass kept back for the next lower order.
  """

  keys: np.ndarray
  discounted: np.ndarray
  totals: np.ndarray
  reserves: np.ndarray


def document_places(tokens: np.ndarray, bos: int) -> np.ndarray:
  """Place of every token in its document, int64 [N]; bos is at 0.

  Raises:
    ValueError: the tokens do not start with bos.
  """
  starts = np.flatnonzero(tokens == bos)
  if not len(starts) or starts[0]:
    raise ValueError('expected tokens that start with bos')
  lengths = np.diff(np.append(starts, len(tokens)))
  return np.arange(len(tokens)) - np.repeat(starts, lengths)


def discounts(counts: np.ndarray) -> np.ndarray:
  """What is taken from counts of 0, 1, 2, and 3 or more: float64 [4], from counts of counts.

  Where the text is so small that one of the counts of counts is 0, or an estimate is outside
  [0, count], all three are the plain Kneser–Ney discount (a half without counts of 1 and 2).

  Args:
    counts: of all n-grams of an order.

  Source: Chen & Goodman 1998, equation 26.
  """
  ones, twos, threes, fours = (float(np.count_nonzero(counts == k)) for k in (1, 2, 3, 4))
  plain = ones / (ones + 2 * twos) if ones and twos else 0.5
  if min(ones, twos, threes, fours) > 0:
    found = [
      1 - 2 * plain * twos / ones,
      2 - 3 * plain * threes / twos,
      3 - 4 * plain * fours / threes,
    ]
    if all(0 <= d <= k for d, k in zip(found, (1, 2, 3))):
      return np.array([0.0, *found])
  return np.array([0.0, plain, plain, plain])


class KneserNey:
  """An interpolated modified Kneser–Ney model: `P(token | up to order - 1 tokens before it)`."""

  def __init__(self, tokens: np.ndarray, *, bos: int, vocab_size: int, order: int = 5):
    """Counts the n-grams of some documents.

    Args:
      tokens: [N] documents one after the other, each starting with bos.
      bos: the id that starts documents; it is context only, never predicted.
      vocab_size: number of ids.
      order: longest n-gram, at least 1.
    """
    self._bos, self._vocab_size = bos, vocab_size
    words = np.asarray(tokens, np.int64)
    places = document_places(words, bos)
    # number[i] is the n-gram of the order at hand that ends at token i; -1 where it would begin
    # before its document. For order 1 it is the token itself.
    number, keys = words, np.arange(vocab_size)
    counts = np.bincount(words[places > 0], minlength=vocab_size)
    contexts = 1
    self._orders: list[_Order] = []
    for size in range(1, order):
      ends = np.flatnonzero(places >= size)
      longer, first, inverse, repeats = np.unique(
        number[ends - 1] * vocab_size + words[ends],
        return_index=True,
        return_inverse=True,
        return_counts=True,
      )
      # A lower order counts how many tokens an n-gram was seen after. Nothing stands before bos,
      # so n-grams that start with it keep their plain counts.
      continued = np.bincount(number[ends[first]], minlength=len(keys))
      if size > 1:
        at_start = number[places == size - 1]
        continued[at_start] = counts[at_start]
      self._orders.append(self._level(keys, continued, contexts))
      contexts, keys, counts = len(keys), longer, repeats
      number = np.full(len(words), -1)
      number[ends] = inverse
    self._orders.append(self._level(keys, counts, contexts))

  def _level(self, keys: np.ndarray, counts: np.ndarray, contexts: int) -> _Order:
    """Discounts the counts of one order and sums them by context."""
    taken = discounts(counts)[np.minimum(counts, 3)]
    context = keys // self._vocab_size
    return _Order(
      keys=keys,
      discounted=counts - taken,
      totals=np.bincount(context, weights=counts, minlength=contexts),
      reserves=np.bincount(context, weights=taken, minlength=contexts),
    )

  def probabilities(self, tokens: np.ndarray) -> np.ndarray:
    """P of each token that is not bos given those before it in its document, float64 [targets].

    Args:
      tokens: [N] documents one after the other, each starting with bos.
    """
    words = np.asarray(tokens, np.int64)
    places = document_places(words, self._bos)
    result = np.full(len(words), 1.0 / self._vocab_size)
    number = np.zeros(len(words), np.int64)  # of the context before each token; -1 if never seen
    for size, level in enumerate(self._orders, start=1):
      ends = np.flatnonzero((places >= max(size - 1, 1)) & (number >= 0))
      context = number[ends]
      slot, known = _find(level.keys, context * self._vocab_size + words[ends])
      totals = level.totals[context]
      seen = totals > 0
      ends, slot, known, context = ends[seen], slot[seen], known[seen], context[seen]
      own = np.where(known, level.discounted[slot], 0.0)
      result[ends] = (own + level.reserves[context] * result[ends]) / totals[seen]
      if size < len(self._orders):
        number = self._next_contexts(words, places, number, size)
    return result[places > 0]

  def _next_contexts(
    self, words: np.ndarray, places: np.ndarray, number: np.ndarray, size: int
  ) -> np.ndarray:
    """Numbers of the contexts of `size` tokens before each token; -1 where never seen."""
    following = np.full(len(words), -1)
    ends = np.flatnonzero(places >= size)
    if size == 1:
      following[ends] = words[ends - 1]
      return following
    before = number[ends - 1]
    slot, known = _find(
      self._orders[size - 1].keys, np.maximum(before, 0) * self._vocab_size + words[ends - 1]
    )
    following[ends] = np.where(known & (before >= 0), slot, -1)
    return following


def _find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Index of each wanted key in the sorted keys, and whether it is there."""
  slot = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
  return slot, keys[slot] == wanted
