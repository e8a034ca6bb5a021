"""The processes of a run: one that works alone, or several that do everything together.

All processes of a run go through the same program in the same order. What a single process may
decide for itself (to stop, for a signal that it got) several have to agree on first.
"""

import signal
import time
from collections.abc import Callable

import jax

from deepseek_jax.sharding import agreement
from deepseek_jax.train.interrupt import Stop, StoppedEarlyError, in_background
from deepseek_jax.train.pulse import Pulse

_SIGNAL, _SECONDS = range(2)
_FAILED = 'failed'


class Alone:
  """The only process."""

  def in_background[Result](self, work: Callable[[], Result], stop: Stop) -> Result:
    """Runs work that must not keep the process from hearing a signal; see `interrupt`."""
    return in_background(work, stop)

  def stopping(self, step: int, stop: Stop) -> str | None:
    """Returns the signal that asks for the run's end after this step, or None."""
    return stop.requested


class Several:
  """One of several processes."""

  def __init__(self):
    """Compiles nothing yet."""
    self._pulse: Pulse | None = None
    self._mark: tuple[int, float] | None = None

  def in_background[Result](self, work: Callable[[], Result], stop: Stop) -> Result:
    """Runs work in every process, and goes on when all have done it; or ends in all, early.

    Raises:
      StoppedEarlyError: some process was asked to stop before it was done.
      PeerError: another process failed.
    """
    folder = agreement.fresh_folder()
    mine = f'{folder}/{jax.process_index()}'
    alert = _Alert(stop, folder)
    try:
      result = in_background(work, alert)
    except StoppedEarlyError as error:
      agreement.tell(mine, str(error))
      if str(error) == _FAILED:
        raise agreement.PeerError('another process failed') from None
      raise
    except BaseException:
      agreement.tell(mine, _FAILED)
      raise
    agreement.tell(mine, None)
    # Whoever was done first waits here; each vote stands, so that all come to the same end.
    votes = [agreement.hear(f'{folder}/{index}') for index in range(jax.process_count())]
    for index, vote in enumerate(votes):
      if vote == _FAILED:
        raise agreement.PeerError(f'process {index} failed')
    reason = next((vote for vote in votes if vote is not None), None)
    if reason is not None:
      raise StoppedEarlyError(reason)
    return result

  def stopping(self, step: int, stop: Stop) -> str | None:
    """Returns the signal that some process got a moment ago, to all after the same step."""
    if self._pulse is None:
      self._pulse = Pulse(width=2)
    found = self._pulse.receive()
    if found is not None:
      number = int(found[:, _SIGNAL].max())
      if number:
        return signal.Signals(number).name
      self._pulse.pace(step - 1, float(found[:, _SECONDS].max()))
    if self._pulse.due(step):
      now = time.perf_counter()
      seconds = 0.0
      if self._mark is not None and step > self._mark[0]:
        seconds = (now - self._mark[1]) / (step - self._mark[0])
      self._mark = (step, now)
      number = 0 if stop.requested is None else signal.Signals[stop.requested].value
      self._pulse.send(step, [number, seconds])
    return None


Team = Alone | Several


def make_team() -> Team:
  """Returns what this process is; touches no device."""
  return Alone() if agreement.alone() else Several()


class _Alert:
  """A `Stop` that also hears of the signals of other processes."""

  def __init__(self, stop: Stop, folder: str):
    self._stop, self._folder = stop, folder
    self._asked = time.monotonic()
    self._heard: str | None = None

  @property
  def requested(self) -> str | None:
    """The signal that came to any process, or what became of another."""
    if self._stop.requested is not None:
      return self._stop.requested
    now = time.monotonic()
    if self._heard is None and now - self._asked > 1.0:
      self._asked = now
      votes = agreement.told(self._folder).values()
      self._heard = next((vote for vote in votes if vote is not None), None)
    return self._heard
