"""Room on the disk: looked at before it is needed, and clear words where there is none."""

import errno
import pathlib
import shutil
from typing import Any

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.describe import bytes_text
from deepseek_jax.core.tree import bytes_of

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What Orbax and tensorstore say, who pass the system's error on as text.
_FULL_TEXTS = ('ENOSPC', 'EDQUOT', 'EFBIG', 'No space left', 'quota exceeded', 'File too large')
# Indices, JSON and the folders themselves, beside the arrays.
_OVERHEAD_BYTES = 1 << 20


class DiskFullError(ConfigError):
  """A disk, or a quota on it, has no room for what had to be written."""


def free_bytes(path: pathlib.Path) -> int:
  """Returns the bytes that this user may still write at a path, which need not exist yet."""
  while not path.exists() and path != path.parent:
    path = path.parent
  return shutil.disk_usage(path).free


def needed_bytes(state: Any) -> int:
  """Returns the bytes of a checkpoint of a pytree of arrays, or of their shapes and dtypes."""
  return bytes_of(state) + _OVERHEAD_BYTES


def is_full(error: BaseException | None) -> bool:
  """Whether an error, or one that it came from, says that the disk or a quota is full."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in _FULL:
      return True
    if any(text in str(error) for text in _FULL_TEXTS):
      return True
    error = error.__cause__ or error.__context__
  return False


def full(path: pathlib.Path, what: str, needed: int | None = None) -> DiskFullError:
  """Returns the error that names the folder, what did not fit, and the bytes needed and free.

  Args:
    path: what was to be written.
    what: it in words.
    needed: its bytes, if known.
  """
  need = '' if needed is None else f' needs {bytes_text(needed)},'
  free = bytes_text(free_bytes(path))
  return DiskFullError(
    f'{path}: the disk is full: {what}{need or " does not fit,"} {free} are free'
  )


def check_room(folder: pathlib.Path, state: Any, kept: int, present: int) -> str | None:
  """Refuses a run that cannot save once; returns a warning for one that may run out of room.

  Args:
    folder: of the checkpoints.
    state: pytree of arrays, or of their shapes and dtypes.
    kept: most checkpoints that are on the disk at once, the one being written among them.
    present: those that are there already.

  Raises:
    DiskFullError: there is no room for one checkpoint.
  """
  each, free = needed_bytes(state), free_bytes(folder)
  if free < each:
    raise full(folder, 'a checkpoint of this run', each)
  wanted = each * max(kept - present, 1)
  if free >= wanted:
    return None
  return (
    f'{folder}: {bytes_text(free)} are free; the checkpoints of this run will take up to '
    f'{bytes_text(wanted)} more'
  )
