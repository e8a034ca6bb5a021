"""What a sweep shows: a live table with a row a variant, or plain lines."""

import time
from collections.abc import Sequence
from typing import Protocol

import rich.console
import rich.live
import rich.table
import rich.text

from deepseek_jax.core.describe import duration
from deepseek_jax.lab.sweep_file import Status, Trial, status_of
from deepseek_jax.train.metrics import JsonLines

REFRESH_SECONDS = 1.0


class SweepDisplay(Protocol):
  """Shows the progress of a sweep."""

  def started(self, trial: Trial) -> None:
    """Says that a process was started for a run."""

  def ended(self, trial: Trial, status: Status, seconds: float) -> None:
    """Says how far a run is whose process has ended."""

  def refresh(self) -> None:
    """Looks at what runs."""

  def close(self) -> None:
    """Leaves the terminal as it was."""


class SweepLines:
  """One line for each start and end."""

  def __init__(self, trials: int, finished: int):
    """Remembers how many runs there are, and how many were finished before."""
    self._trials, self._finished = trials, finished

  def started(self, trial: Trial) -> None:
    """Prints the start."""
    print(f'start   {trial.name}', flush=True)

  def ended(self, trial: Trial, status: Status, seconds: float) -> None:
    """Prints the end."""
    self._finished += status.kind == 'finished'
    count = f'[{self._finished}/{self._trials}]'
    print(f'{describe_end(trial, status)}  {duration(seconds)}  {count}', flush=True)

  def refresh(self) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Does nothing."""


class SweepTable:
  """A row a variant at the foot of the terminal; ends of runs stay above it."""

  def __init__(self, trials: Sequence[Trial], console: rich.console.Console):
    """Draws the table."""
    self._trials, self._console = list(trials), console
    self._running: list[Trial] = []
    self._statuses = {trial.name: status_of(trial) for trial in trials}
    self._drawn = 0.0
    self._live = rich.live.Live(self._render(), console=console, auto_refresh=False)
    self._live.start()

  def started(self, trial: Trial) -> None:
    """Draws at once."""
    self._running.append(trial)
    self._drawn = 0.0

  def ended(self, trial: Trial, status: Status, seconds: float) -> None:
    """Prints the end above the table."""
    self._running.remove(trial)
    self._statuses[trial.name] = status
    line = f'{describe_end(trial, status)}  {duration(seconds)}'
    self._console.print(line, markup=False, highlight=False)
    self._drawn = 0.0

  def refresh(self) -> None:
    """Draws, if it is time."""
    if time.monotonic() - self._drawn >= REFRESH_SECONDS:
      self._drawn = time.monotonic()
      self._live.update(self._render(), refresh=True)

  def close(self) -> None:
    """Leaves the last table."""
    self._live.update(self._render(), refresh=True)
    self._live.stop()

  def _render(self) -> rich.table.Table:
    grid = rich.table.Table('variant', 'finished', 'failed', 'held-out bits/byte', 'running')
    for name in dict.fromkeys(trial.variant for trial in self._trials):
      own = [trial for trial in self._trials if trial.variant == name]
      kinds = [self._statuses[trial.name].kind for trial in own]
      found = [held_out(t) for t in own if self._statuses[t.name].kind == 'finished']
      figures = [figure for figure in found if figure is not None]
      running = [progress(trial) for trial in self._running if trial.variant == name]
      grid.add_row(
        rich.text.Text(name),
        f'{kinds.count("finished")}/{len(own)}',
        rich.text.Text(str(kinds.count('failed')), style='red' if 'failed' in kinds else 'dim'),
        ' '.join(f'{figure:.4f}' for figure in figures),
        rich.text.Text(', '.join(running)),
      )
    return grid


def progress(trial: Trial) -> str:
  """Returns `seed 1: 120/2000, loss 3.21` of a run that is going on."""
  rows = JsonLines(trial.workdir.path / 'metrics.jsonl').read()
  if not rows:
    return f'seed {trial.seed}: compiling'
  loss = rows[-1].get('loss')
  shown = 'nan' if loss is None else f'{loss:.3f}'
  return f'seed {trial.seed}: {rows[-1]["step"]}/{trial.experiment.train_steps}, loss {shown}'


def held_out(trial: Trial) -> float | None:
  """Returns the last held-out bits per byte of a run, or None where there is no number."""
  rows = JsonLines(trial.workdir.evaluations).read()
  return rows[-1].get('bits_per_byte') if rows else None


def describe_end(trial: Trial, status: Status) -> str:
  """Returns one line on a run whose process has ended."""
  total = trial.experiment.train_steps
  if status.kind == 'finished':
    figure = held_out(trial)
    shown = 'nan' if figure is None else f'{figure:.4f}'
    odd = f'  ({status.reason}; see {trial.log})' if status.reason else ''
    return f'done    {trial.name}  bits/byte {shown}{odd}'
  if status.kind == 'failed':
    return f'FAILED  {trial.name}  step {status.step}/{total}: {status.reason}; see {trial.log}'
  return f'stopped {trial.name}  step {status.step}/{total}'
