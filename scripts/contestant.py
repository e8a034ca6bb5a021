"""Processes that take turns on one machine, so that all of them meet it in the same state."""

import pathlib
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Contestant:
  """A process that makes one step when it is told to, and sleeps in between."""

  def __init__(self, command: list[str]):
    """Starts it and waits until it is ready."""
    start = time.perf_counter()
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    self.facts = self._answer('ready')
    self.ready_seconds = time.perf_counter() - start
    self.rows: list[list[float]] = []

  def step(self) -> None:
    """Makes one step and keeps its row of figures: seconds first."""
    assert self.process.stdin is not None
    self.process.stdin.write('step\n')
    self.process.stdin.flush()
    self.rows.append(self._answer('step'))

  def seconds(self, warmup: int) -> list[float]:
    """Returns the seconds of every step but the first few."""
    return [row[0] for row in self.rows[warmup:]]

  def close(self) -> None:
    """Ends the process."""
    self.process.communicate('stop\n', timeout=60)

  def _answer(self, kind: str) -> list[float]:
    assert self.process.stdout is not None
    for line in self.process.stdout:
      words = line.split()
      if words and words[0] == kind:
        return [float(word) for word in words[1:]]
    raise SystemExit(f'{self.process.args!r}: ended with code {self.process.wait()}')
