"""Writes TensorBoard event files in the thread that asks, so that a full disk is an error there."""

import contextlib
import os
import pathlib
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

from deepseek_jax.train.disk import full, is_full

_FLUSH_SECONDS = 10.0


class Board:
  """One event file, appended to every few seconds.

  A writer with a thread and a queue of its own would lose its thread at a full disk, and the run
  would wait for it for ever.
  """

  def __init__(self, folder: pathlib.Path, purge_step: int | None):
    """Makes the file.

    Args:
      folder: where TensorBoard looks.
      purge_step: steps from this one on in earlier files are not to be shown; None keeps all.

    Raises:
      DiskFullError: if there is no room.
    """
    # Imported here: it brings protobuf, and `--help` should not wait for it.
    from tensorboardX.proto import event_pb2

    self._proto = event_pb2
    # Files are named by the second: a suffix keeps a quick resume from replacing the first.
    suffix = '' if purge_step is None else f'.{purge_step}'
    name = f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}{suffix}'
    self._path = folder / name
    self._buffer = bytearray()
    self._due = 0.0
    self._add(event_pb2.Event(file_version='brain.Event:2'))
    if purge_step is not None:
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._add(event_pb2.Event(step=purge_step, session_log=start))

  def scalar(self, step: int, name: str, value: float) -> None:
    """Adds one number to a curve.

    Args:
      step: the number of finished steps.
      name: of the curve.
      value: finite.
    """
    from tensorboardX import summary

    self._add(self._proto.Event(step=step, summary=summary.scalar(name, value)))

  def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
    """Adds a histogram of numbers.

    Args:
      step: the number of finished steps.
      name: of the histogram.
      values: at least one, all finite.
    """
    import numpy as np
    from tensorboardX import summary

    found = summary.histogram(name, np.asarray(values), bins=30)
    self._add(self._proto.Event(step=step, summary=found))

  def close(self) -> None:
    """Writes out what is left."""
    self._flush()

  def _add(self, event: Any) -> None:
    from tensorboardX.record_writer import masked_crc32c

    event.wall_time = time.time()
    data = event.SerializeToString()
    for part in (struct.pack('<Q', len(data)), data):
      self._buffer += part + struct.pack('<I', masked_crc32c(part))
    if time.monotonic() >= self._due:
      self._flush()

  def _flush(self) -> None:
    """Appends what is waiting to the file; where it does not fit, the file is as it was."""
    waiting, self._buffer = bytes(self._buffer), bytearray()
    self._due = time.monotonic() + _FLUSH_SECONDS
    before = self._path.stat().st_size if self._path.exists() else 0
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      with self._path.open('ab', buffering=0) as file:
        while waiting:
          waiting = waiting[file.write(waiting) :]
    except OSError as error:
      with contextlib.suppress(OSError):
        os.truncate(self._path, before)
      if not is_full(error):
        raise
      raise full(self._path.parent, 'a curve') from error
