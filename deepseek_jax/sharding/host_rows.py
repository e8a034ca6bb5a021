"""Arrays that lie on several hosts: each host brings its part, and reads what it can see."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding


def own_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> np.ndarray | None:
  """Returns which rows of a batch the devices of this host hold, ascending; None where all do.

  Hosts that share a sequence, a model or a stage hold the same rows, and each reads them.

  Args:
    sharding: of the batch.
    shape: [B, …] of the whole batch, over all hosts.

  Returns:
    int64 [rows].
  """
  if sharding.is_fully_addressable:
    return None
  held = np.zeros(shape[0], bool)
  for index in sharding.addressable_devices_indices_map(shape).values():
    assert index is not None  # only devices without a part have none
    held[index[0]] = True
  return np.flatnonzero(held)


def put_rows(tree: Any, sharding: NamedSharding, batch: int, rows: np.ndarray | None) -> Any:
  """Makes arrays over all hosts of the rows that each host has read.

  Args:
    tree: pytree of NumPy arrays [rows, …].
    sharding: of each array [B, …].
    batch: B, over all hosts.
    rows: which these are, as `own_rows` gives them; None is all.
  """
  if rows is None:
    return jax.device_put(tree, sharding)

  def put(local: np.ndarray) -> jax.Array:
    def part(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None
      # A device holds neighbouring rows, and this host has all of them, side by side.
      begin, end, _ = index[0].indices(batch)
      place = int(np.searchsorted(rows, begin))
      return local[(slice(place, place + end - begin), *index[1:])]

    return jax.make_array_from_callback((batch, *local.shape[1:]), sharding, part)

  return jax.tree.map(put, tree)


def put_whole(host: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  """Makes an array of what every host has whole."""
  if sharding.is_fully_addressable:
    return jax.device_put(host, sharding)
  return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index or ()])


def fetch(array: jax.Array) -> np.ndarray:
  """Returns an array whole, on every host; all hosts call it alike."""
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(array, tiled=True))
