"""A folder of computed arrays, each entry built once: atomic, versioned, keyed by a hash."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np

# Part of every key: raise it when the meaning of any stored file changes.
FORMAT_VERSION = 2

_META = 'meta.json'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """A finished entry.

  Attributes:
    path: its folder.
    meta: what its builder returned.
  """

  path: pathlib.Path
  meta: dict[str, Any]

  def array(self, name: str) -> np.ndarray:
    """One of its arrays, memory-mapped and read-only."""
    return np.load(self.path / f'{name}.npy', mmap_mode='r')


def key(kind: str, parts: dict[str, Any]) -> str:
  """The name of an entry: its kind and a hash of everything that decides its content."""
  described = json.dumps({'format': FORMAT_VERSION, 'kind': kind, **parts}, sort_keys=True)
  return f'{kind}-{hashlib.sha256(described.encode("utf-8")).hexdigest()[:24]}'


def entry(
  folder: pathlib.Path, name: str, build: Callable[[pathlib.Path], dict[str, Any]]
) -> Entry:
  """Opens an entry, building it first if it is not there or not whole.

  Several processes may ask at once: each builds in a folder of its own, and the first to finish
  gives the entry its name in one step.

  Args:
    folder: of the store; made if needed.
    name: from `key`.
    build: writes the files into the folder it is given and returns a JSON-able record.
  """
  final = folder / name
  found = _open(final)
  if found is not None:
    return found
  folder.mkdir(parents=True, exist_ok=True)
  scratch = folder / f'.{name}.{os.getpid()}.{uuid.uuid4().hex[:8]}'
  scratch.mkdir()
  try:
    _seal(scratch, build(scratch))
    return _publish(scratch, final)
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def _seal(scratch: pathlib.Path, meta: dict[str, Any]) -> None:
  """Writes the record with the size of every file, and sees all of it to the disk."""
  sizes = {path.name: path.stat().st_size for path in sorted(scratch.iterdir())}
  record = {'format': FORMAT_VERSION, 'sizes': sizes, 'meta': meta}
  (scratch / _META).write_text(json.dumps(record), encoding='utf-8')
  for path in (*scratch.iterdir(), scratch):
    descriptor = os.open(path, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


def _publish(scratch: pathlib.Path, final: pathlib.Path) -> Entry:
  """Gives the finished folder its name, unless another process was first."""
  # A rename onto a folder that is not empty fails, so that what others may be reading stays.
  while True:
    try:
      os.rename(scratch, final)
    except OSError:
      if not final.exists():
        raise
    found = _open(final)
    if found is not None:
      return found
    # Something is there but not whole (a copy cut short): move it aside, then try again. When
    # another process does so at the same moment, one of the two renames finds nothing.
    aside = final.with_name(f'.{final.name}.damaged.{uuid.uuid4().hex[:8]}')
    with contextlib.suppress(FileNotFoundError):
      os.rename(final, aside)
      shutil.rmtree(aside, ignore_errors=True)


def _open(path: pathlib.Path) -> Entry | None:
  """The entry at `path`; None if it is not there or a file is missing, cut or of another size."""
  try:
    record = json.loads((path / _META).read_text(encoding='utf-8'))
    whole = record['format'] == FORMAT_VERSION and all(
      (path / name).stat().st_size == size for name, size in record['sizes'].items()
    )
    return Entry(path=path, meta=record['meta']) if whole else None
  except (OSError, ValueError, KeyError, TypeError):
    return None
