"""Lines that tell a waiting reader what is being done."""

import sys
import time


def say(message: str) -> None:
  """Prints one line to standard error."""
  print(message, file=sys.stderr, flush=True)


class Progress:
  """Reports a long count now and then; says nothing about short ones."""

  def __init__(self, what: str, unit: str, first_seconds: float = 2.0):
    """Starts the clock.

    Args:
      what: what is being done, e.g. 'tokenizing train'.
      unit: what is counted, e.g. 'documents'.
      first_seconds: when the first line is due; later ones are five seconds apart.
    """
    self._what, self._unit = what, unit
    self._start = time.monotonic()
    self._due = self._start + first_seconds
    self._spoke = False

  def update(self, count: int) -> None:
    """Prints the count when a line is due."""
    now = time.monotonic()
    if now >= self._due:
      self._due, self._spoke = now + 5.0, True
      say(f'{self._what}: {count:,} {self._unit} in {now - self._start:.0f} s')

  def finish(self, count: int) -> None:
    """Prints the total if anything was printed before."""
    if self._spoke:
      say(f'{self._what}: done, {count:,} {self._unit} in {time.monotonic() - self._start:.0f} s')
