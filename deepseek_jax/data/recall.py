"""Rows that only a model with a memory can finish: values to be found again by their keys.

Nothing is stored: a row is made from its number. Keys, values and all that lies between them are
symbols of their own kinds, so that what has to be learnt is to look back, and how far.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.batch import Batch, MediaShape
from deepseek_jax.data.pipeline import Prepared
from deepseek_jax.data.symbols import SPECIALS, Symbols
from deepseek_jax.data.tokenizer import BOS


class Layout(NamedTuple):
  """Where the P pairs of a row lie, and the Q questions.

  Attributes:
    given: [P] int, place of each pair's key; its value is at the next place.
    asked: [Q] int, place of each question, a pair's key; its answer is at the next place.
    pair: [Q] int, the pair that each asks for.
  """

  given: np.ndarray
  asked: np.ndarray
  pair: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiQuery:
  """Pairs first; then questions, most of them soon and some late.

  The k-th free place after the pairs is taken with a weight of k^(power − 1). As long as there are
  as many questions as pairs, or fewer, no pair is asked for twice.

  Attributes:
    pairs: keys with a value each.
    questions: keys that come again.
    power: from 0 (nearly all soon) to 1 (equally often everywhere), not 0 itself.

  Source: Arora et al., arXiv 2312.04927, section 3.2 and appendix A, with as many questions as
    pairs.
  """

  pairs: int = 16
  questions: int = 16
  power: float = 0.01

  def __post_init__(self):
    _check(self)
    if not 0 < self.power <= 1:
      raise ConfigError(f'MultiQuery.power: expected above 0 and at most 1, found {self.power}')

  @property
  def least(self) -> int:
    """Tokens that a row must have."""
    return 2 * (self.pairs + self.questions) + 1

  def layout(self, generator: np.random.Generator, length: int) -> Layout:
    """Places the pairs of a row of `length` tokens, bos among them."""
    given = 1 + 2 * np.arange(self.pairs)
    first = 1 + 2 * self.pairs
    slots = np.arange((length - first) // 2)
    odds = (slots + 1.0) ** (self.power - 1)
    chosen = generator.choice(len(slots), self.questions, replace=False, p=odds / odds.sum())
    return Layout(given, first + 2 * chosen, _rounds(self, generator))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scattered:
  """Pairs anywhere in the first half of a row, among other symbols; questions in the second.

  As long as there are as many questions as pairs, or fewer, no pair is asked for twice.

  Attributes:
    pairs: keys with a value each.
    questions: keys that come again.
  """

  pairs: int = 4
  questions: int = 4

  def __post_init__(self):
    _check(self)

  @property
  def least(self) -> int:
    """Tokens that a row must have."""
    return 4 * max(self.pairs, self.questions) + 1

  def layout(self, generator: np.random.Generator, length: int) -> Layout:
    """Places the pairs of a row of `length` tokens, bos among them."""
    slots = (length - 1) // 2
    half = slots // 2
    given = 1 + 2 * generator.choice(half, self.pairs, replace=False)
    asked = 1 + 2 * (half + generator.choice(slots - half, self.questions, replace=False))
    return Layout(given, asked, _rounds(self, generator))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle:
  """Pairs anywhere among other symbols; at the end of the row all their keys, in another order.

  Attributes:
    pairs: keys with a value each: the needles.

  Source: the task is that of Kamradt's needle in a haystack, with symbols for sentences.
  """

  pairs: int = 4

  def __post_init__(self):
    _check(self)

  @property
  def questions(self) -> int:
    """As many as pairs."""
    return self.pairs

  @property
  def least(self) -> int:
    """Tokens that a row must have."""
    return 4 * self.pairs + 1

  def layout(self, generator: np.random.Generator, length: int) -> Layout:
    """Places the pairs of a row of `length` tokens, bos among them."""
    last = length - 2 * self.pairs
    slots = (last - 1) // 2
    given = 1 + 2 * generator.choice(slots, self.pairs, replace=False)
    return Layout(given, last + 2 * np.arange(self.pairs), _rounds(self, generator))


Task = MultiQuery | Scattered | Needle


def _check(task: Task) -> None:
  """Refuses a task without pairs or questions."""
  messages = [
    f'{type(task).__name__}.{field.name}: expected at least 1, found {size}'
    for field in dataclasses.fields(task)
    if field.name in ('pairs', 'questions') and (size := getattr(task, field.name)) < 1
  ]
  if messages:
    raise ConfigError(messages)


def _rounds(task: Task, generator: np.random.Generator) -> np.ndarray:
  """Draws which pair each question asks for [Q]: all of them before any comes again."""
  rounds = -(-task.questions // task.pairs)
  pair = np.concatenate([generator.permutation(task.pairs) for _ in range(rounds)])
  return pair[: task.questions]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
  """Rows of symbols in which values are asked for by their keys; only the answers are learnt.

  Attributes:
    task: where the pairs lie and where they are asked for.
    keys: symbols that are keys.
    values: symbols that are values.
    noise: symbols that fill the places between.
    train_rows: rows to learn from, before they come again.
    heldout_rows: rows to measure on.
    length: T, tokens in a row.
    batch_size: B, rows in a batch, over all hosts.
    shuffle_seed: of the training rows and their order, from 0 to 2³² - 1.
  """

  task: Task = MultiQuery()
  keys: int = 64
  values: int = 64
  noise: int = 16
  train_rows: int = 1_000_000
  heldout_rows: int = 256
  length: int = 128
  batch_size: int = 16
  shuffle_seed: int = 0

  def __post_init__(self):
    """Refuses sizes below 1, too few keys, and rows without room for what is asked."""
    sizes = 'keys', 'values', 'noise', 'train_rows', 'heldout_rows', 'batch_size'
    messages = [
      f'Recall.{name}: expected at least 1, found {size}'
      for name in sizes
      if (size := getattr(self, name)) < 1
    ]
    if self.keys < self.task.pairs:
      messages.append(
        f'Recall.keys: expected at least task.pairs, {self.task.pairs}, since the keys of a row '
        f'differ; found {self.keys}'
      )
    if self.length < self.task.least:
      messages.append(
        f'Recall.length: expected at least {self.task.least}, bos, {self.task.pairs} pairs and '
        f'{self.task.questions} questions; found {self.length}'
      )
    if not 0 <= self.shuffle_seed < 2**32:
      messages.append(f'Recall.shuffle_seed: expected 0 to {2**32 - 1}, found {self.shuffle_seed}')
    if messages:
      raise ConfigError(messages)

  @property
  def media(self) -> dict[str, MediaShape]:
    """There are none."""
    return {}

  @property
  def tokenizer(self) -> Symbols:
    """Numbers the symbols: keys first, then values, then noise."""
    return Symbols(self.keys + self.values + self.noise)

  def prepare(self, cache_dir: pathlib.Path) -> 'RecallData':
    """Opens the rows; nothing is read or written."""
    del cache_dir
    return RecallData(
      config=self,
      tokenizer=self.tokenizer.build(),
      train=RecallSplit(name='train', config=self),
      heldout=RecallSplit(name='heldout', config=self),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RecallSplit:
  """Rows of a split; each is made when it is read.

  Attributes:
    name: 'train' or 'heldout'.
    config: what the rows are.
  """

  name: str
  config: Recall

  @property
  def length(self) -> int:
    """Places in a row."""
    return self.config.length

  @property
  def rows(self) -> int:
    """Number of rows."""
    return self.config.train_rows if self.name == 'train' else self.config.heldout_rows

  @property
  def documents(self) -> int:
    """Number of rows: each is a document."""
    return self.rows

  @functools.cached_property
  def titles(self) -> tuple[str, ...]:
    """Number of each row, in words."""
    return tuple(f'row {number}' for number in range(self.rows))

  @property
  def targets(self) -> int:
    """Answers of all rows."""
    return self.rows * self.config.task.questions

  @property
  def occupancy(self) -> float:
    """Share of the places in the rows that hold a token."""
    return 1.0

  def bits_per_byte(self, nats: float) -> float:
    """Bits an answer, from the summed negative log-likelihood of all: a symbol counts as a byte."""
    return nats / np.log(2.0) / self.targets

  def row(self, index: int) -> tuple[np.ndarray, Layout]:
    """A row's symbols with the answer to the last question [T + 1] int32, and where they lie."""
    c = self.config
    # Held-out rows do not depend on the seed: figures of two runs compare.
    seed = (0, c.shuffle_seed) if self.name == 'train' else (1,)
    generator = np.random.default_rng((*seed, index))
    given, asked, pair = c.task.layout(generator, c.length)
    symbols = c.keys + c.values + generator.integers(c.noise, size=c.length + 1)
    keys = generator.choice(c.keys, c.task.pairs, replace=False)
    values = c.keys + generator.integers(c.values, size=c.task.pairs)
    for places, which in ((given, np.arange(c.task.pairs)), (asked, pair)):
      symbols[places], symbols[places + 1] = keys[which], values[which]
    tokens = (SPECIALS + symbols).astype(np.int32)
    tokens[0] = BOS
    return tokens, Layout(given, asked, pair)

  def batch(self, indices: Iterable[int]) -> Batch:
    """Some rows as a batch of NumPy arrays [B, T].

    Args:
      indices: rows, each from 0; -1 gives a row of padding only.

    Raises:
      IndexError: a row is outside the split.
    """
    indices = [int(i) for i in indices]
    shape = (len(indices), self.length)
    fields: dict[str, Any] = {
      name: np.zeros(shape, np.int32) for name in ('tokens', 'targets', 'positions', 'segments')
    }
    fields['weights'] = np.zeros(shape, np.float32)
    fields['documents'] = np.full(shape, -1, np.int32)
    for line, index in enumerate(indices):
      if not -1 <= index < self.rows:
        raise IndexError(f'row {index} is outside the {self.rows} rows of {self.name}')
      if index < 0:
        continue
      tokens, layout = self.row(index)
      fields['tokens'][line], fields['targets'][line] = tokens[:-1], tokens[1:]
      fields['weights'][line, layout.asked] = 1.0
      fields['positions'][line] = np.arange(self.length)
      fields['segments'][line] = 1
      fields['documents'][line] = index
    # Batch is typed for the step, where its fields are JAX arrays.
    return Batch(**fields)


class RecallData(Prepared[Recall, RecallSplit]):
  """Rows to learn from, and others to measure on."""
