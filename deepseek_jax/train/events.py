"""Starts, resumes and ends of a run, in a file that survives them all."""

import datetime
import pathlib
from typing import Literal

from deepseek_jax.train.metrics import JsonLines

Kind = Literal['started', 'resumed', 'stopped', 'finished', 'failed']


def record(workdir: pathlib.Path, step: int, kind: Kind, reason: str | None = None) -> None:
  """Appends one row to `events.jsonl`; a start that no end follows was killed, or is going on.

  Args:
    workdir: the folder of the run.
    step: finished steps at that moment.
    kind: what happened.
    reason: the signal of a stop, the message of a failure.
  """
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  row = {'step': step, 'event': kind, 'time': now}
  JsonLines(workdir / 'events.jsonl').append(row if reason is None else {**row, 'reason': reason})
