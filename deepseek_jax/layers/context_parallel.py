"""How tokens reach keys where devices share a sequence, and in which order these hold it.

A sequence is shared where `Rules.seq` names mesh axes of more than one device: the preset CONTEXT.
What acts on each token alone does not notice; attention does. Its kinds either run on every device
for the tokens that it holds, with what they need of the others brought there (`with_all_keys`,
`attend_spread`), or leave it to the compiler, which gathers what it likes.

Kinds that see a bounded part of the row (a window, entries, chosen tokens) bring just that,
whatever stands in the field: it says how keys come to queries that may see them all.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from deepseek_jax.ops.attention.reference import Seen
from deepseek_jax.ops.attention.ring import Axes, Keys, attend_around, attend_gathered


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contiguous:
  """Every device holds neighbouring tokens: those of the first device see few, of the last many."""

  def chunks(self, devices: int) -> np.ndarray:
    """Returns which piece of the row lies in each place of it, [pieces] int."""
    return np.arange(devices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZigZag:
  """Every device holds an early and a late chunk of the row, so that all see as many pairs.

  Of 2 · P chunks device i holds i and 2 · P - 1 - i. In a row of one document every device then
  has the same work; packed documents are short, and their work is more even to begin with.

  Source: Llama 3, arXiv 2407.21783, section 3.3.2.
  """

  def chunks(self, devices: int) -> np.ndarray:
    """Returns which chunk of the row lies in each place of it, [2 · devices] int."""
    first = np.arange(devices)
    return np.stack([first, 2 * devices - 1 - first], axis=1).reshape(-1)


Order = Contiguous | ZigZag


def arrange(x: Any, order: Order, devices: int, axis: int = 1) -> Any:
  """Puts the tokens of a row, along `axis` of [B, T, …], in the order that devices hold them in."""
  return _permute(x, order.chunks(devices), axis)


def restore(x: Any, order: Order, devices: int, axis: int = 1) -> Any:
  """The inverse of `arrange`."""
  return _permute(x, np.argsort(order.chunks(devices)), axis)


def _permute(x: Any, chunks: np.ndarray, axis: int) -> Any:
  if np.array_equal(chunks, np.arange(len(chunks))):
    return x
  shape = x.shape
  pieces = x.reshape(*shape[:axis], len(chunks), shape[axis] // len(chunks), *shape[axis + 1 :])
  return pieces.take(chunks, axis=axis).reshape(shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
  """Keys go around a ring: a device holds its own and those of one other at a time.

  Memory grows with the tokens of a device alone. Of latent attention the latents travel, and each
  device makes keys and values of all heads from them, which costs C · (nope + V) / (t · (nope + R +
  V)) of the scores of the t tokens that a device has.

  Attributes:
    order: which tokens a device holds.

  Source: Liu et al., arXiv 2310.01889.
  """

  order: Order = Contiguous()

  def attend(
    self, query: jax.Array, keys: Keys, seen: Seen, *, scale: float, axes: Axes
  ) -> jax.Array:
    """Attends from a device's queries [B, T, H, K] to the keys of all, giving [B, T, H, V]."""
    return attend_around(query, keys, seen, scale=scale, axes=axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllGather:
  """Every device gathers what all keys are made of, and attends at once.

  One message instead of one a device, and keys of the whole row in every device's memory.

  Attributes:
    order: which tokens a device holds.

  Source: Llama 3, arXiv 2407.21783, section 3.3.2.
  """

  order: Order = Contiguous()

  def attend(
    self, query: jax.Array, keys: Keys, seen: Seen, *, scale: float, axes: Axes
  ) -> jax.Array:
    """Attends from a device's queries [B, T, H, K] to the keys of all, giving [B, T, H, V]."""
    return attend_gathered(query, keys, seen, scale=scale, axes=axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partitioned:
  """The compiler spreads attention as it finds best: what the other kinds are compared with."""

  @property
  def order(self) -> Order:
    """Which tokens a device holds."""
    return Contiguous()


ContextParallel = Ring | AllGather | Partitioned


def count_pairs(
  positions: np.ndarray, segments: np.ndarray, order: Order, devices: int
) -> np.ndarray:
  """Counts the pairs of a token and one that it sees, by the devices that hold the two.

  Args:
    positions: [B, T] int place of each token in its segment, in the order of the row.
    segments: [B, T] int; 0 is padding, which sees nothing.
    order: which tokens a device holds.
    devices: devices that share a row.

  Returns:
    [devices of the queries, devices of the keys] int64.
  """
  positions = np.asarray(positions, np.int64)
  place = np.arange(positions.shape[1])
  end = np.where(np.asarray(segments) > 0, place + 1, 0)
  begin = place - positions
  chunks = order.chunks(devices)
  size, owner = len(place) // len(chunks), np.argsort(chunks) // (len(chunks) // devices)
  pairs = np.zeros((devices, devices), np.int64)
  for chunk, device in enumerate(owner):
    # A token sees a stretch of the row: what of it lies in this chunk.
    seen = np.minimum(end, (chunk + 1) * size) - np.maximum(begin, chunk * size)
    by_chunk = np.maximum(seen, 0).reshape(len(seen), len(chunks), size).sum(axis=(0, 2))
    np.add.at(pairs[:, device], owner, by_chunk)
  return pairs


def imbalance(pairs: np.ndarray) -> tuple[float, float]:
  """Returns how uneven the work is: the most of a device over the mean.

  Args:
    pairs: [devices, devices] from `count_pairs`.

  Returns:
    Of all work; and of a ring, where all wait for the busiest after every step.
  """
  devices, mean = len(pairs), pairs.sum() / len(pairs)
  own = np.arange(devices)
  steps = [pairs[own, (own - step) % devices].max() for step in range(devices)]
  return float(pairs.sum(axis=1).max() / mean), float(sum(steps) / mean)
