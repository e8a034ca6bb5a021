"""Where a run's numbers go: a JSON-lines file, TensorBoard, and the terminal."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.train.board import Board
from deepseek_jax.train.disk import full, is_full
from deepseek_jax.train.display import Display


class JsonLines:
  """A file with one JSON object a line, each holding a `step`.

  Every row is on its way to the disk when `append` returns. NaN and the infinities, which JSON does
  not have, are written as null, so that any JSON reader takes the file (pandas reads null as NaN).

  Attributes:
    path: the file; it and its directory are made by the first `append`.
  """

  def __init__(self, path: str | pathlib.Path):
    """Remembers the path; touches no file.

    Args:
      path: the file.
    """
    self.path = pathlib.Path(path)

  def append(self, row: Mapping[str, Any]) -> None:
    """Writes one row and flushes it.

    Args:
      row: must have an integer 'step'; scalars and arrays of NumPy or JAX become numbers and lists.

    Raises:
      DiskFullError: if the row does not fit on the disk; the file is as it was.
    """
    line = json.dumps(_plain({**row, 'step': int(row['step'])}), allow_nan=False) + '\n'
    self.path.parent.mkdir(parents=True, exist_ok=True)
    before = self.path.stat().st_size if self.path.exists() else 0
    try:
      with self.path.open('ab') as file:
        file.write(line.encode('utf-8'))
    except OSError as error:
      if not is_full(error):
        raise
      with contextlib.suppress(OSError):
        os.truncate(self.path, before)
      raise full(self.path, f'the row of step {int(row["step"])}') from error

  def read(self) -> list[dict[str, Any]]:
    """All rows in order; empty if there is no file.

    A last line without its line end, which a killed run may leave, is not a row.

    Returns:
      One dict a line; null is None.

    Raises:
      ConfigError: if a finished line is not a JSON object with a step.
    """
    if not self.path.exists():
      return []
    lines = self.path.read_text(encoding='utf-8').split('\n')[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
      try:
        row = json.loads(line)
        rows.append({**row, 'step': int(row['step'])})
      except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
          f'{self.path}:{number}: expected a JSON object with a step, found {line[:60]!r}'
        ) from error
    return rows

  def truncate(self, step: int) -> int:
    """Drops the rows beyond a step, and a half-written last line; the file is replaced whole.

    Args:
      step: the last step to keep.

    Returns:
      How many rows were dropped.

    Raises:
      DiskFullError: if there is no room for the copy; the file is as it was.
    """
    if not self.path.exists():
      return 0
    rows = self.read()
    kept = [row for row in rows if row['step'] <= step]
    fresh = self.path.with_name(self.path.name + '.new')
    try:
      fresh.write_text(''.join(json.dumps(row) + '\n' for row in kept), encoding='utf-8')
    except OSError as error:
      fresh.unlink(missing_ok=True)
      if not is_full(error):
        raise
      raise full(self.path, 'a shortened copy of the log') from error
    os.replace(fresh, self.path)
    return len(rows) - len(kept)


class NoRows(JsonLines):
  """The same for a process that leaves the writing to another: rows are dropped."""

  def append(self, row: Mapping[str, Any]) -> None:
    """Drops the row."""

  def truncate(self, step: int) -> int:
    """Leaves the file to the other process."""
    return 0


class MetricWriter:
  """Writes the numbers of a step to `metrics.jsonl`, to TensorBoard and to the terminal.

  Lists and dicts of lists (expert loads by layer) stay lists in the file; in TensorBoard a list
  becomes one scalar an entry (`max_violation/03`), and a dict of lists one histogram a key
  (`load/layers/3/…`). What is not finite is left out of TensorBoard and is null in the file.

  Attributes:
    rows: the JSON-lines file.
    display: what shows the numbers on the terminal.
  """

  def __init__(self, workdir: str | pathlib.Path, display: Display):
    """Remembers where to write; makes no file.

    Args:
      workdir: the run's directory; gets `metrics.jsonl` and `tensorboard/`.
      display: shows the numbers; closed with the writer.
    """
    self._workdir = pathlib.Path(workdir)
    self.rows = JsonLines(self._workdir / 'metrics.jsonl')
    self.display = display
    self._purge_step: int | None = None
    self._board: Board | None = None

  def __enter__(self) -> 'MetricWriter':
    """Returns itself."""
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    """Closes the files and the display."""
    self.close()

  def truncate(self, step: int) -> int:
    """Forgets what was written beyond a restored step; call it before the first `write`.

    Args:
      step: the step the run resumes from.

    Returns:
      How many rows of `metrics.jsonl` were dropped.

    Raises:
      ConfigError: if something was written already.
    """
    if self._board is not None:
      raise ConfigError('MetricWriter.truncate must come before the first write')
    self._purge_step = step + 1
    return self.rows.truncate(step)

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes the numbers of one step everywhere.

    Args:
      step: the number of finished steps.
      metrics: name → scalar, list of numbers, or dict of name → list of numbers. Anything that
        NumPy can read is a number; device arrays must be finished.
    """
    plain = _plain(metrics)
    self.rows.append({'step': step, **plain})
    self._write_board(step, metrics)
    self.display.update(step, plain)

  def write_scalars(self, step: int, prefix: str, scalars: Mapping[str, float]) -> None:
    """Writes scalars to TensorBoard alone, for numbers that have a file of their own.

    Args:
      step: the number of finished steps.
      prefix: put before each name, such as 'held_out'.
      scalars: name → number.
    """
    self._write_board(step, {f'{prefix}/{name}': value for name, value in scalars.items()})

  def close(self) -> None:
    """Closes the files and the display."""
    board, self._board = self._board, None
    if board is not None:
      board.close()
    self.display.close()

  def _write_board(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes one step to TensorBoard."""
    if self._board is None:
      self._board = Board(self._workdir / 'tensorboard', self._purge_step)
    for name, value in metrics.items():
      if isinstance(value, Mapping):
        for key, entries in value.items():
          entries = np.asarray(entries, np.float64)
          if entries.size and np.isfinite(entries).all():
            self._board.histogram(step, f'{name}/{key}', entries.tolist())
      else:
        entries = np.asarray(math.nan if value is None else value, np.float64)
        for index, entry in enumerate(entries.ravel()):
          if math.isfinite(entry):
            self._board.scalar(step, f'{name}/{index:02d}' if entries.ndim else name, entry)


class DisplayOnly(MetricWriter):
  """The same for a process that leaves the writing to another: numbers are shown."""

  def truncate(self, step: int) -> int:
    """Leaves the files to the other process."""
    return 0

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Shows the numbers of one step."""
    self.display.update(step, _plain(metrics))

  def write_scalars(self, step: int, prefix: str, scalars: Mapping[str, float]) -> None:
    """Leaves TensorBoard to the other process."""


def _plain(value: Any) -> Any:
  """The same as JSON knows it: arrays become lists, NaN and the infinities None."""
  if isinstance(value, Mapping):
    return {str(key): _plain(entry) for key, entry in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(entry) for entry in value]
  if value is None or isinstance(value, (str, bool, int)):
    return value
  array = np.asarray(value)
  if array.ndim:
    return [_plain(entry) for entry in array]
  if array.dtype.kind in 'biu':
    return array.item()
  number = float(array)
  return number if math.isfinite(number) else None
