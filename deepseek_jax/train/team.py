"""The processes of a run: one that works alone, or several that do everything together.

All processes of a run go through the same program in the same order. What a single process may
decide for itself (to stop, for a signal that it got) several have to agree on first.
"""

import signal
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from deepseek_jax.sharding import agreement
from deepseek_jax.train.display import Display
from deepseek_jax.train.interrupt import Stop, StoppedEarlyError, in_background
from deepseek_jax.train.metrics import JsonLines
from deepseek_jax.train.pulse import Pulse
from deepseek_jax.train.straggler import Probe, find_stragglers

_SIGNAL, _SECONDS, _HOST, _PROBE = range(_WIDTH := 4)
_PROBE_PULSES = 10
_FAILED = 'failed'


class Alone:
  """The only process."""

  def in_background[Result](self, work: Callable[[], Result], stop: Stop) -> Result:
    """Runs work that must not keep the process from hearing a signal; see `interrupt`."""
    return in_background(work, stop)

  def stopping(self, step: int, stop: Stop, result: jax.Array, host_seconds: float) -> str | None:
    """Returns the signal that asks for the run's end after this step, or None.

    Args:
      step: that was dispatched last.
      stop: what this process has heard.
      result: of the step.
      host_seconds: that this process worked before it.
    """
    return stop.requested

  def figures(self) -> dict[str, Any]:
    """Returns what a row of the log says of each process; of one, nothing."""
    return {}


class Several:
  """One of several processes."""

  def __init__(self, display: Display, faults: JsonLines):
    """Compiles nothing yet.

    Args:
      display: shows a line for a process that falls behind, or catches up.
      faults: gets a row for one that falls behind.
    """
    self._display, self._faults = display, faults
    self._pulse: Pulse | None = None
    self._probe: Probe | None = None
    self._hosts: list[str] = []
    self._pulses = 0
    self._mark: tuple[int, float] | None = None
    self._host_seconds: list[float] = []
    self._last: np.ndarray | None = None
    self._slow: set[int] = set()
    self._suspects: set[int] = set()

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

  def stopping(self, step: int, stop: Stop, result: jax.Array, host_seconds: float) -> str | None:
    """Returns the signal that some process got a moment ago, to all after the same step.

    About once a second the processes tell one another what they have heard and how long they took;
    every tenth time their devices are timed first, with nothing else to do. Arguments are those of
    `Alone.stopping`.
    """
    if self._pulse is None:
      self._pulse, self._probe = Pulse(width=_WIDTH), Probe()
      self._hosts = agreement.gather(socket.gethostname())
    self._host_seconds.append(host_seconds)
    found = self._pulse.receive()
    if found is not None:
      number = int(found[:, _SIGNAL].max())
      if number:
        return signal.Signals(number).name
      self._pulse.pace(step - 1, float(found[:, _SECONDS].max()))
      self._compare(step - 1, found)
    if self._pulse.due(step):
      self._pulse.send(step, self._row(step, stop, result))
    return None

  def figures(self) -> dict[str, Any]:
    """Returns what a row of the log says of each process, once it has been measured."""
    if self._last is None:
      return {}
    probes = self._last[:, _PROBE]
    return {
      'process_seconds': probes.tolist(),
      'process_host_seconds': self._last[:, _HOST].tolist(),
      'process_spread': float(probes.max() / probes.min() - 1),
    }

  def _row(self, step: int, stop: Stop, result: jax.Array) -> list[float]:
    """What this process tells the others."""
    now, seconds, probe = time.perf_counter(), 0.0, 0.0
    if self._mark is not None and step > self._mark[0]:
      seconds = (now - self._mark[1]) / (step - self._mark[0])
    self._pulses += 1
    if self._pulses % _PROBE_PULSES == 0 and self._probe is not None:
      jax.block_until_ready(result)
      probe = self._probe.seconds()
      # Timing is no part of a step.
      now = time.perf_counter()
    self._mark = (step, now)
    host = statistics.fmean(self._host_seconds)
    self._host_seconds = []
    number = 0 if stop.requested is None else signal.Signals[stop.requested].value
    return [number, seconds, host, probe]

  def _compare(self, step: int, found: np.ndarray) -> None:
    """Says who has fallen behind, and who has caught up."""
    if not found[:, _PROBE].all():
      return
    self._last = found
    seconds = float(found[:, _SECONDS].max())
    slow = find_stragglers(found[:, _PROBE].tolist(), found[:, _HOST].tolist(), seconds)
    # Once may be chance: a process is named when it is slow twice in a row.
    named = slow.keys() & self._suspects
    for index in sorted(named - self._slow):
      message = f'process {index} ({self._hosts[index]}) holds the others up: {slow[index]}'
      row = {'step': step, 'kind': 'straggler', 'message': message, 'process': index}
      self._faults.append(row)
      self._display.message(f'step {step}: {message}')
    for index in sorted(self._slow - slow.keys()):
      self._display.message(f'step {step}: process {index} ({self._hosts[index]}) has caught up')
    self._slow = (self._slow & slow.keys()) | named
    self._suspects = set(slow)


Team = Alone | Several


def make_team(display: Display, faults: JsonLines) -> Team:
  """Returns what this process is; touches no device.

  Args:
    display: what the terminal shows.
    faults: the log of what went wrong.
  """
  return Alone() if agreement.alone() else Several(display, faults)


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
