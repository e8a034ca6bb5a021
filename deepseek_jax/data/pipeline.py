"""From a description of the data to batches: any batch of the run, from its number alone."""

import dataclasses
import functools
import pathlib
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.batch import Batch, MediaShape, Rows
from deepseek_jax.data.cache import token_cache
from deepseek_jax.data.packed_split import PackedSplit
from deepseek_jax.data.packing import pack_plan
from deepseek_jax.data.source import AnySource, Embedded
from deepseek_jax.data.split import Split
from deepseek_jax.data.tokenizer import BPE, AnyTokenizer, Tokenizer

# Threads that read rows ahead of the step, and how many batches they may be ahead. Threads and not
# processes: the arrays are memory-mapped, and a process would cost more than the work.
_READ_THREADS = 2
_READ_AHEAD = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextCorpus:
  """Packed text: where it comes from, how it is cut, how it is mixed.

  Attributes:
    source: of the documents.
    tokenizer: what makes tokens of them.
    length: T, tokens in a row.
    batch_size: B, rows in a batch, over all hosts.
    shuffle_seed: of the order of the training rows, from 0 to 2³² - 1.
  """

  source: AnySource = Embedded()
  tokenizer: AnyTokenizer = BPE()
  length: int = 512
  batch_size: int = 16
  shuffle_seed: int = 0

  def __post_init__(self):
    """Refuses sizes below 1 and seeds that Grain cannot take."""
    messages = []
    if self.length < 1:
      messages.append(f'TextCorpus.length: expected at least 1, found {self.length}')
    if self.batch_size < 1:
      messages.append(f'TextCorpus.batch_size: expected at least 1, found {self.batch_size}')
    if not 0 <= self.shuffle_seed < 2**32:
      messages.append(
        f'TextCorpus.shuffle_seed: expected 0 to {2**32 - 1}, found {self.shuffle_seed}'
      )
    if messages:
      raise ConfigError(messages)

  @property
  def media(self) -> dict[str, MediaShape]:
    """There are none."""
    return {}

  def prepare(self, cache_dir: pathlib.Path) -> 'TextData':
    """Tokenizes and packs, or opens what an earlier run did.

    Args:
      cache_dir: folder for tokens and pack plans; made if needed.

    Raises:
      ConfigError: the text or the tokenizer cannot be read.
    """
    tokenizer = self.tokenizer.build()

    def packed(split: Split) -> PackedSplit:
      cache = token_cache(self.source, tokenizer, split, cache_dir)
      # Held-out rows do not depend on the seed: figures of two runs compare.
      seed = self.shuffle_seed if split == 'train' else 0
      plan = pack_plan(cache.offsets, cache.fingerprint, self.length, seed, cache_dir)
      return PackedSplit(name=split, cache=cache, plan=plan)

    return TextData(
      config=self, tokenizer=tokenizer, train=packed('train'), heldout=packed('heldout')
    )


class Shuffled(Protocol):
  """What a config of data says of its batches."""

  @property
  def batch_size(self) -> int:
    """B, rows in a batch, over all hosts."""

  @property
  def shuffle_seed(self) -> int:
    """Of the order of the training rows."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prepared[C: Shuffled, R: Rows]:
  """Data that can be read.

  Attributes:
    config: what it was prepared from.
    tokenizer: what made the tokens.
    train: rows to learn from.
    heldout: rows to measure on.
  """

  config: C
  tokenizer: Tokenizer
  train: R
  heldout: R

  def train_batches(self, step: int, rows: slice | np.ndarray | None = None) -> Iterator[Batch]:
    """Endless batches of the training split from a step on; see `train_batches`."""
    return train_batches(
      self.train,
      step,
      batch_size=self.config.batch_size,
      seed=self.config.shuffle_seed,
      rows=rows,
    )


class TextData(Prepared[TextCorpus, PackedSplit]):
  """Prepared text."""

  def heldout_text(self) -> bytes:
    """The UTF-8 text of the held-out documents, one after the other."""
    documents = self.config.source.documents('heldout')
    return b''.join(document.text.encode('utf-8') for document in documents)


def train_batches(
  split: Rows,
  step: int,
  *,
  batch_size: int,
  seed: int,
  rows: slice | np.ndarray | None = None,
  workers: int = 0,
) -> Iterator[Batch]:
  """Endless [B, T] NumPy batches of shuffled rows, in another order each epoch.

  Batch k depends on the split, the batch size, the seed and k only: a run that starts at `step`
  sees what an uninterrupted one would see, on any number of hosts.

  Args:
    split: the rows.
    step: number of the first batch.
    batch_size: B, over all hosts.
    seed: of the shuffling, from 0 to 2³² - 1.
    rows: which rows of each batch to read, for one host of several, as a slice or as their
      numbers; None reads all.
    workers: processes that read; 0 reads in threads of this one. The batches are the same.

  Raises:
    ValueError: the step is negative, or no row is asked for.
  """
  if step < 0:
    raise ValueError(f'step: expected at least 0, found {step}')
  wanted = slice(None) if rows is None else rows
  if not np.arange(batch_size)[wanted].size:
    raise ValueError(f'rows: {rows} is none of the {batch_size} rows of a batch')
  import grain  # here, because it takes two seconds that only training should pay

  # Row numbers are shuffled and batched, which is cheap; each host then reads its rows only. A
  # number of epochs is given because grain counts batches in floats: those of one row, without end,
  # would be more than `len` may return.
  epochs = 2**52 // split.rows
  numbers = grain.MapDataset.range(split.rows).shuffle(seed=seed).repeat(epochs)
  batches = numbers.batch(batch_size).map(functools.partial(_load, split, wanted))
  if workers:
    _settle_flag()
    alone = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return _Copies(iter(batches[step:].to_iter_dataset(alone).mp_prefetch(options)))
  reading = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_READ_AHEAD)
  return iter(batches[step:].to_iter_dataset(reading))


class _Copies:
  """Batches of other processes as arrays of this one; the processes end with it.

  Grain hands arrays over in shared memory, which must be given back while the interpreter is whole.
  """

  def __init__(self, batches: Any):
    self._batches = batches
    # Unlike `__del__` it also runs at the end of the interpreter, and early enough.
    self.close = weakref.finalize(self, batches.close)

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    return jax.tree.map(np.array, next(self._batches))


def _settle_flag() -> None:
  """Gives Grain's flag about its processes the default where nobody parses flags, as in a notebook.

  Grain reads it with the first batch and would raise; scripts parse flags, and it is left alone.
  """
  from grain._src.core import profiler

  holder: Any = getattr(profiler, '_GRAIN_ENABLE_MULTIPROCESS_WORKER_PROFILING', None)
  if holder is not None:
    flag = holder._flagvalues[holder.name]
    flag.present = max(1, flag.present)


def _load(split: Rows, wanted: slice | np.ndarray, indices: np.ndarray) -> Batch:
  """The wanted rows of a batch; at the top of the module, so that it can go to other processes."""
  return split.batch(indices[wanted])
