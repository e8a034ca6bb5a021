"""Seals on the parts of a checkpoint: size and checksum of every file, checked before it is used.

The array files have no checksum of their own: a flipped bit in one would be read as a weight. The
seal is written by the thread that writes the part, before the checkpoint gets its final name: a
checkpoint is whole with its seals, or absent.
"""

import asyncio
import concurrent.futures
import json
import os
import pathlib
import zlib
from collections.abc import Awaitable
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from deepseek_jax.core.config import ConfigError

SEAL = 'seal.json'
PARTS = ('state', 'data_state', 'config')
"""The parts of a checkpoint that have a seal."""

MARKERS = ('_CHECKPOINT_METADATA', 'commit_success.txt', 'state/_METADATA')
"""Files that every finished checkpoint has."""
_CHUNK_BYTES = 1 << 22
_THREADS = 4


class _Sealed(ocp.handlers.CheckpointableHandler):
  """Writes and reads a part as Orbax does, and seals what was written."""

  _kind: Any

  def __init__(self):
    self._inner = self._kind()

  async def save(self, directory: Any, checkpointable: Any) -> Awaitable[None]:
    """Copies what must be copied now; returns the writing that may wait."""
    writing = await self._inner.save(directory, checkpointable)

    async def write() -> None:
      await writing
      # Of several processes the first writes for all; the writing above waits for every one.
      if jax.process_index() == 0:
        path = pathlib.Path(await directory.await_creation())
        await asyncio.to_thread(write_seal, path)

    return write()

  async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Awaitable[Any]:
    """Reads the part."""
    return await self._inner.load(directory, abstract_checkpointable)

  async def metadata(self, directory: Any) -> Any:
    """Reads what the part is."""
    return await self._inner.metadata(directory)

  def is_handleable(self, checkpointable: Any) -> bool:
    """Whether the part can be written."""
    return self._inner.is_handleable(checkpointable)

  def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
    """Whether the part can be read like that."""
    return self._inner.is_abstract_handleable(abstract_checkpointable)


class SealedTree(_Sealed):
  """Arrays with a seal."""

  _kind = ocp.handlers.PyTreeHandler


class SealedJson(_Sealed):
  """A JSON object with a seal."""

  _kind = ocp.handlers.JsonHandler


def write_seal(folder: pathlib.Path) -> None:
  """Writes `seal.json`: for each file below the folder its bytes and its CRC-32.

  Args:
    folder: of a part that is completely written.
  """
  files = sorted(path for path in folder.rglob('*') if path.is_file() and path.name != SEAL)
  content = {str(path.relative_to(folder)): list(_measure(path)) for path in files}
  (folder / SEAL).write_text(json.dumps({'files': content}), encoding='utf-8')


def find_damage(checkpoint: pathlib.Path) -> str | None:
  """Says what is wrong with a checkpoint, or None if every byte is as it was written.

  Checkpoints from before there were seals have none: of these only what is there is looked at.

  Args:
    checkpoint: folder of a step.

  Raises:
    ConfigError: the files may not be read by this user.
  """
  fault = find_obvious_damage(checkpoint)
  if fault is not None:
    return fault
  try:
    sealed = [part for part in PARTS if (checkpoint / part / SEAL).exists()]
    for part in PARTS if sealed else ():
      fault = _compare(checkpoint / part)
      if fault is not None:
        return f'{part}/{fault}'
    return None
  except PermissionError as error:
    raise ConfigError(f'{error.filename}: {error.strerror}') from error
  except OSError as error:
    return f'{error.filename}: {error.strerror}'


def find_obvious_damage(checkpoint: pathlib.Path) -> str | None:
  """Says which file is missing or not JSON, without a look at the arrays; None if all are there.

  Args:
    checkpoint: folder of a step.
  """
  for name in MARKERS:
    if not (checkpoint / name).exists():
      return f'{name} is missing'
  names = ['_CHECKPOINT_METADATA', 'config/data.json', 'data_state/data.json']
  if (checkpoint / 'metrics').is_dir():
    names.append('metrics/metrics')
  for name in names:
    try:
      json.loads((checkpoint / name).read_bytes())
    except FileNotFoundError:
      return f'{name} is missing'
    except OSError as error:
      return f'{name}: {error.strerror}'
    except ValueError:
      return f'{name} is not JSON'
  return None


def _compare(folder: pathlib.Path) -> str | None:
  """Names the first file of a part that is not as its seal says."""
  if not (folder / SEAL).exists():
    return f'{SEAL} is missing'
  try:
    files = json.loads((folder / SEAL).read_bytes())['files']
    expected = {str(name): (int(size), int(check)) for name, (size, check) in files.items()}
  except (ValueError, TypeError, KeyError, AttributeError):
    return f'{SEAL} is damaged'
  for name, (size, _) in expected.items():
    path = folder / name
    if not path.is_file():
      return f'{name} is missing'
    if path.stat().st_size != size:
      return f'{name} has {path.stat().st_size:,} bytes, expected {size:,}'
  with concurrent.futures.ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
    measured = pool.map(_measure, [folder / name for name in expected])
    for (name, wanted), found in zip(expected.items(), measured, strict=True):
      if found != wanted:
        return f'{name} has other content than was written'
  return None


def _measure(path: pathlib.Path) -> tuple[int, int]:
  """Bytes and CRC-32 of a file."""
  size, check = 0, 0
  with path.open('rb', buffering=0) as stream:
    while chunk := stream.read(_CHUNK_BYTES):
      size, check = size + len(chunk), zlib.crc32(chunk, check)
  return size, check
