"""Snapshots: cheap copies of the state on a disk beside each process, between the checkpoints.

A checkpoint is durable and fits any mesh; a snapshot is neither. It is one file a process with what
its own devices hold, as it lies in memory, and serves the same processes when they start again. It
is used where it is newer than the newest checkpoint and every process has its part of it, whole.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import threading
import zlib
from typing import Any

import jax
import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.sharding.agreement import gather

_KEPT = 2
"""Files of a process. Processes are killed at different moments: where one has just begun to write
the newest snapshot, all go back to the one before."""
_CHUNK_BYTES = 1 << 24
Index = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
  """How often, and where, a run keeps snapshots beside its checkpoints.

  Attributes:
    every: steps from one snapshot to the next.
    folder: on a disk of each host; None is `snapshots/` in the run's folder.
  """

  every: int = 10
  folder: str | None = None

  def __post_init__(self):
    if self.every < 1:
      raise ConfigError(f'`every` is {self.every}; expected 1 or more')


class Snapshots:
  """The snapshots of one process of a run.

  Attributes:
    every: steps from one snapshot to the next.
    folder: of this process's files.
  """

  def __init__(self, config: Snapshot, workdir: pathlib.Path):
    """Remembers where things go; touches no file.

    Args:
      config: how often and where.
      workdir: the folder of the run.
    """
    self.every = config.every
    run = workdir / 'snapshots'
    if config.folder is not None:
      # Several runs may share a disk.
      mark = zlib.crc32(str(workdir.absolute()).encode())
      run = pathlib.Path(config.folder).expanduser() / f'{workdir.absolute().name}-{mark:08x}'
    self.folder = run / f'process_{jax.process_index()}'
    self._thread: threading.Thread | None = None
    self.failure: OSError | None = None

  def save(self, step: int, state: Any) -> bool:
    """Copies what this process holds of a state to the host, and writes it in the background.

    Args:
      step: the number of finished steps.
      state: pytree of arrays; may be donated as soon as this returns.

    Returns:
      Whether it did: where the one before is still being written, nothing is done.
    """
    if self._thread is not None and self._thread.is_alive():
      return False
    shards = [shard for _, leaf in _leaves(state) for shard in _distinct(leaf)]
    for shard in shards:
      shard.copy_to_host_async()
    # A copy: on a CPU the array would be seen through, and its memory could not be given away.
    parts = [np.array(shard) for shard in shards]
    described = describe(state)
    self._thread = threading.Thread(target=self._write, args=(step, described, parts), daemon=True)
    self._thread.start()
    return True

  def wait(self) -> None:
    """Waits until the last snapshot is written, or has failed."""
    if self._thread is not None:
      self._thread.join()

  def clear(self) -> None:
    """Removes all snapshots: what they hold is saved for good."""
    self.wait()
    shutil.rmtree(self.folder, ignore_errors=True)

  def newest(self, beyond: int, abstract_state: Any) -> int:
    """Returns the newest step that every process has a whole snapshot of; all processes ask.

    Args:
      beyond: older ones are of no use, such as the newest checkpoint's step.
      abstract_state: shapes, dtypes and shardings that are wanted.

    Returns:
      The step; 0 where there is none beyond.
    """
    described = describe(abstract_state)
    own = {step for step in self._steps() if step > beyond and self._whole(step, described)}
    return max(set.intersection(*gather(own)), default=0)

  def restore(self, step: int, abstract_state: Any) -> Any:
    """Reads the snapshot of a step that `newest` has found.

    Args:
      step: which one.
      abstract_state: shapes, dtypes and shardings.

    Returns:
      The state on the devices.
    """
    data = np.memmap(self._path(step), np.uint8, 'r')
    offset = 0
    arrays = []
    for _, leaf in _leaves(abstract_state):
      parts: dict[Index, np.ndarray] = {}
      for index in _indices(leaf):
        shape = tuple(end - begin for begin, end in index)
        size = int(np.prod(shape)) * leaf.dtype.itemsize
        parts[index] = data[offset : offset + size].view(leaf.dtype).reshape(shape)
        offset += size
      places = leaf.sharding.addressable_devices_indices_map(leaf.shape)
      arrays.append(
        jax.make_array_from_single_device_arrays(
          leaf.shape,
          leaf.sharding,
          # A copy, since the step gives this memory to its results.
          [
            jax.device_put(np.array(parts[_plain(index, leaf.shape)]), device)
            for device, index in places.items()
          ],
        )
      )
    return jax.tree.unflatten(jax.tree.structure(abstract_state), arrays)

  def _path(self, step: int) -> pathlib.Path:
    return self.folder / f'{step}.bin'

  def _seal(self, step: int) -> pathlib.Path:
    return self.folder / f'{step}.json'

  def _steps(self) -> list[int]:
    """Steps that have a seal, ascending."""
    return sorted(int(path.stem) for path in self.folder.glob('*.json') if path.stem.isdecimal())

  def _write(self, step: int, described: list[Any], parts: list[np.ndarray]) -> None:
    """Writes the file, then its seal, then removes what is too old. There is no wait for the disk.

    What a killed process has written the system still writes out; after a crash of the system the
    checksum tells.
    """
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      check, size = 0, 0
      fresh = self.folder / f'{step}.bin.new'
      with fresh.open('wb', buffering=0) as file:
        for part in parts:
          flat = memoryview(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
          for start in range(0, len(flat), _CHUNK_BYTES):
            chunk = flat[start : start + _CHUNK_BYTES]
            check, size = zlib.crc32(chunk, check), size + file.write(chunk)
      os.replace(fresh, self._path(step))
      seal = {'step': step, 'bytes': size, 'crc': check, 'parts': described}
      fresh = self.folder / f'{step}.json.new'
      fresh.write_text(json.dumps(seal), encoding='utf-8')
      os.replace(fresh, self._seal(step))
      for old in self._steps()[:-_KEPT]:
        self._seal(old).unlink(missing_ok=True)
        self._path(old).unlink(missing_ok=True)
    except OSError as error:
      # A snapshot that cannot be written costs nothing but itself.
      self.failure = error

  def _whole(self, step: int, described: list[Any]) -> bool:
    """Whether a snapshot is of this layout, and every byte as it was written."""
    try:
      seal = json.loads(self._seal(step).read_bytes())
      if seal['parts'] != described or self._path(step).stat().st_size != seal['bytes']:
        return False
      check = 0
      with self._path(step).open('rb', buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
          check = zlib.crc32(chunk, check)
      return check == seal['crc']
    except (OSError, ValueError, KeyError, TypeError):
      return False


def make_snapshots(config: Snapshot | None, workdir: pathlib.Path) -> Snapshots | None:
  """Returns the snapshots of a run's process; None where the run keeps none."""
  return None if config is None else Snapshots(config, workdir)


def describe(state: Any) -> list[Any]:
  """Returns what a file of this process holds: address, dtype, shape and parts of every array.

  Args:
    state: pytree of arrays, or of shapes with shardings.
  """
  return [
    [
      jax.tree_util.keystr(path),
      np.dtype(leaf.dtype).name,
      list(leaf.shape),
      [[list(pair) for pair in index] for index in _indices(leaf)],
    ]
    for path, leaf in _leaves(state)
  ]


def _leaves(state: Any) -> list[tuple[Any, Any]]:
  return jax.tree_util.tree_leaves_with_path(state)


def _plain(index: tuple[slice, ...], shape: tuple[int, ...]) -> Index:
  return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _indices(leaf: Any) -> list[Index]:
  """The different parts of an array that this process holds, in order."""
  places = leaf.sharding.addressable_devices_indices_map(tuple(leaf.shape))
  return sorted({_plain(index, leaf.shape) for index in places.values()})


def _distinct(leaf: jax.Array) -> list[jax.Array]:
  """One device's array for each of these parts."""
  found = {_plain(shard.index, leaf.shape): shard.data for shard in leaf.addressable_shards}
  return [found[index] for index in _indices(leaf)]
