"""Which experts each entry of a vocabulary goes to: tables for hash routing."""

import dataclasses
import functools
import heapq
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random:
  """Different experts at random for each token; another table for each layer and seed of a run.

  Source: Roller et al., arXiv 2106.04426, section 3.1.
  """

  def faults(self, vocab: int, experts: int, top_k: int) -> list[str]:
    """Returns what is wrong with what the table is made of: never anything."""
    return []

  def draw(self, key: jax.Array, vocab: int, experts: int, top_k: int) -> jax.Array:
    """Returns a table [V, K] int32; in between there are V · E numbers."""
    return jax.lax.top_k(jax.random.uniform(key, (vocab, experts)), top_k)[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByFrequency:
  """Experts such that all get about the same number of tokens, if tokens come as often as counted.

  The most frequent token chooses first; each takes the K experts with the least load so far. A
  token more frequent than an expert's fair share still overloads its experts. All layers have the
  same table.

  Attributes:
    counts: how often each token occurs: V numbers, or the path of an .npy file with V numbers. It
      is read when a run is checked and when its weights are made, and not after.

  Source: Roller et al., arXiv 2106.04426, section 3.1 (balanced assignment).
  """

  counts: str | tuple[float, ...]

  def faults(self, vocab: int, experts: int, top_k: int) -> list[str]:
    """Returns what is wrong with the counts, as messages."""
    where = self.counts if isinstance(self.counts, str) else '`counts`'
    try:
      counts = self._read()
    except (OSError, ValueError) as error:
      return [f'{where}: expected an .npy file of {vocab} counts; {error}']
    if counts.shape != (vocab,) or counts.dtype.kind not in 'iuf':
      found = f'{counts.dtype}{list(counts.shape)}'
      return [f'{where}: found {found}, expected [{vocab}] numbers, one a token of `vocab`']
    if not np.all(np.isfinite(counts) & (counts >= 0)):
      return [f'{where}: found counts below 0 or not finite']
    return []

  def draw(self, key: jax.Array, vocab: int, experts: int, top_k: int) -> jax.Array:
    """Returns the table [V, K] int32."""

    def make() -> np.ndarray:
      _raise(self.faults(vocab, experts, top_k))
      return spread_by_frequency(self._read(), experts, top_k)

    return _on_host(make, (vocab, top_k))

  def _read(self) -> np.ndarray:
    return _load(self.counts) if isinstance(self.counts, str) else np.asarray(self.counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableFile:
  """A table that is given; all layers have the same.

  Attributes:
    path: an .npy file of whole numbers [V, K], from 0 to E − 1 and different in each row. It is
      read when a run is checked and when its weights are made, and not after.
  """

  path: str

  def faults(self, vocab: int, experts: int, top_k: int) -> list[str]:
    """Returns what is wrong with the file, as messages."""
    expected = f'[{vocab}, {top_k}] whole numbers (`vocab`, `top_k`)'
    try:
      table = _load(self.path)
    except (OSError, ValueError) as error:
      return [f'{self.path}: expected an .npy file of {expected}; {error}']
    if table.shape != (vocab, top_k) or table.dtype.kind not in 'iu':
      return [f'{self.path}: found {table.dtype}{list(table.shape)}, expected {expected}']
    wrong = np.argwhere((table < 0) | (table >= experts))
    if wrong.size:
      token, place = wrong[0].tolist()
      return [
        f'{self.path}: found expert {table[token, place]} for token {token}, expected 0 to '
        f'{experts - 1}'
      ]
    ordered = np.sort(table, axis=1)
    twice = np.flatnonzero(np.any(ordered[:, 1:] == ordered[:, :-1], axis=1))
    if twice.size:
      row = table[twice[0]].tolist()
      return [f'{self.path}: found {row} for token {twice[0]}, expected different experts']
    return []

  def draw(self, key: jax.Array, vocab: int, experts: int, top_k: int) -> jax.Array:
    """Returns the table [V, K] int32."""

    def make() -> np.ndarray:
      _raise(self.faults(vocab, experts, top_k))
      return _load(self.path)

    return _on_host(make, (vocab, top_k))


def spread_by_frequency(counts: np.ndarray, experts: int, top_k: int) -> np.ndarray:
  """Gives each token the `top_k` experts with the least load, the most frequent token first.

  Args:
    counts: [V] how often each token occurs.
    experts: number of experts E.
    top_k: experts K a token goes to.

  Returns:
    [V, K] int32; ties go to the expert with the fewest tokens, then to the lowest.
  """
  table = np.empty((len(counts), top_k), np.int32)
  loads = [(0.0, 0, expert) for expert in range(experts)]
  for token in np.argsort(-counts, kind='stable').tolist():
    taken = [heapq.heappop(loads) for _ in range(top_k)]
    table[token] = [expert for _, _, expert in taken]
    for load, tokens, expert in taken:
      heapq.heappush(loads, (load + float(counts[token]), tokens + 1, expert))
  return table


@functools.lru_cache(maxsize=4)
def _load_version(path: str, changed: int) -> np.ndarray:
  return np.load(path, allow_pickle=False)


def _load(path: str) -> np.ndarray:
  """Reads a file, once as long as it does not change."""
  found = pathlib.Path(path).expanduser()
  return _load_version(str(found), found.stat().st_mtime_ns)


def _on_host(make, shape: tuple[int, ...]) -> jax.Array:
  """Calls a function where arrays are made, not where their shapes are asked for.

  A trained model has its table in the checkpoint and can be read where the file is no more.
  """
  result = jax.ShapeDtypeStruct(shape, jnp.int32)
  return jax.pure_callback(lambda: make().astype(np.int32), result)


def _raise(faults: list[str]) -> None:
  if faults:
    raise ConfigError(faults)
