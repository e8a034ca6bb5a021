"""Runs of a sweep in processes of their own, several at a time; one that fails stops no other."""

import collections
import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

from deepseek_jax.lab.sweep_file import Status, Trial, status_of
from deepseek_jax.train import events
from deepseek_jax.train.interrupt import Stop
from scripts.sweep_display import SweepDisplay

POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class _Running:
  """A process that runs a trial; the parent's end of its standard input says that it lives."""

  trial: Trial
  process: subprocess.Popen
  log: IO[Any]
  slot: int
  began: float


def run_trials(
  trials: Sequence[Trial],
  command: Callable[[Trial], list[str]],
  slots: Sequence[frozenset[int] | None],
  display: SweepDisplay,
  stop: Stop,
) -> dict[str, Status]:
  """Runs what is not finished.

  Args:
    trials: in the order in which they begin.
    command: that runs a trial, and ends it when its standard input ends.
    slots: one a process side by side: the processor cores that are its own, or None for all.
    display: what the terminal shows.
    stop: asked between moments; processes are then asked to save and end.

  Returns:
    Trial's name → how far it is, without those that no process was started for.
  """
  waiting = collections.deque(trials)
  free = list(range(len(slots)))
  running: list[_Running] = []
  results: dict[str, Status] = {}
  told = False
  try:
    while waiting or running:
      if stop.requested and not told:
        told = True
        waiting.clear()
        for run in running:
          run.process.terminate()
      while waiting and free:
        slot = free.pop(0)
        running.append(_start(waiting.popleft(), command, slot, slots[slot]))
        display.started(running[-1].trial)
      for run in [run for run in running if run.process.poll() is not None]:
        running.remove(run)
        free.append(run.slot)
        status = _end(run, stop)
        results[run.trial.name] = status
        display.ended(run.trial, status, time.monotonic() - run.began)
      display.refresh()
      time.sleep(POLL_SECONDS)
  finally:
    for run in running:
      run.process.kill()
      run.process.wait()
      _close(run)
  return results


def split_cores(workers: int) -> list[frozenset[int] | None]:
  """Deals the processor cores out to processes side by side.

  Left to themselves, XLA's threads of every process would want all cores.

  Args:
    workers: how many processes.

  Returns:
    The cores of each; None where all are its own, or where there are fewer than one each.
  """
  if workers == 1 or not hasattr(os, 'sched_getaffinity'):
    return [None] * workers
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < workers:
    return [None] * workers
  return [frozenset(cores[slot::workers]) for slot in range(workers)]


def _start(
  trial: Trial, command: Callable[[Trial], list[str]], slot: int, cores: frozenset[int] | None
) -> _Running:
  trial.log.parent.mkdir(parents=True, exist_ok=True)
  log = trial.log.open('ab')
  process = subprocess.Popen(
    command(trial),
    # The pipe closes when this process dies, by whatever death, and the run then saves and ends.
    stdin=subprocess.PIPE,
    stdout=log,
    stderr=subprocess.STDOUT,
    # Ctrl-C is for this process, which passes it on; the second one would kill a run that saves.
    start_new_session=True,
  )
  if cores is not None:
    with contextlib.suppress(OSError):  # it may be gone already
      os.sched_setaffinity(process.pid, cores)
  return _Running(trial, process, log, slot, time.monotonic())


def _end(run: _Running, stop: Stop) -> Status:
  _close(run)
  status = status_of(run.trial)
  code = run.process.returncode
  if (stop.requested and code in (0, -signal.SIGTERM)) or status.kind in ('failed', 'stopped'):
    return status
  name = f'{code}' if code >= 0 else f'{code} ({signal.Signals(-code).name})'
  if status.kind == 'finished':
    # Its results are whole; what went wrong after them is said all the same.
    return dataclasses.replace(status, reason=f'exit code {name}' if code else None)
  last = last_line(run.trial.log)
  reason = f'the process ended with exit code {name}' + (f'; it said: {last}' if last else '')
  if run.trial.workdir.config.exists():
    # What was killed could not say so itself.
    events.record(run.trial.workdir.path, status.step, 'failed', reason)
  return Status('failed', status.step, reason)


def _close(run: _Running) -> None:
  assert run.process.stdin is not None
  with contextlib.suppress(OSError):
    run.process.stdin.close()
  run.log.close()


def last_line(path: pathlib.Path) -> str:
  """Returns the last line of a text file that is not blank, '' where there is none."""
  text = path.read_bytes()[-4096:].decode('utf-8', 'replace')
  return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), '')
