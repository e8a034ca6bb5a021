"""A group of processes on this machine: started together, watched, ended together."""

import collections
import dataclasses
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHOWN_LINES = 12
_POLL_SECONDS = 0.05
_FLAG = '--xla_force_host_platform_device_count='


class Relay:
  """Notes a signal to this process, to be passed on to those it started.

  Attributes:
    number: of the signal, or None.
  """

  def __init__(self):
    """Waits for none yet."""
    self.number: int | None = None

  def note(self, number: int, frame: FrameType | None) -> None:
    """Handles the signal."""
    self.number = number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Death:
  """How a group of processes ended that did not end well.

  Attributes:
    index: the process that ended first.
    code: its exit code; that of a signal is negative.
    lines: what it said last.
    others: exit codes of the others, by process.
    seconds: from its end to that of the last.
  """

  index: int
  code: int
  lines: tuple[str, ...]
  others: Mapping[int, int]
  seconds: float

  def describe(self, workdir: pathlib.Path) -> str:
    """Returns who died of what, in lines.

    Args:
      workdir: the folder of the run, with the logs of the processes.
    """
    log = workdir / 'logs' / f'process_{self.index}.log'
    lines = self.lines
    # All but the first turn to their logs as soon as there are any.
    if self.index and log.is_file():
      lines = tuple(log.read_text(encoding='utf-8', errors='replace').splitlines()[-SHOWN_LINES:])
    others = ', '.join(f'{index} {ended(code)}' for index, code in sorted(self.others.items()))
    head = f'launch: process {self.index} died: {ended(self.code)}'
    if others:
      head += f'; all had ended {self.seconds:.1f} s later (process {others})'
    said = [f'  | {line}' for line in lines]
    return '\n'.join([head, f'  its last lines ({log}):', *said] if said else [head])


def ended(code: int) -> str:
  """Says an exit code in words: 'by SIGKILL', 'with code 1'."""
  if code >= 0:
    return f'with code {code}'
  try:
    return f'by {signal.Signals(-code).name}'
  except ValueError:
    return f'by signal {-code}'


def argument(arguments: list[str], name: str) -> str | None:
  """Returns the value of `--name=value` or `--name value` among arguments; None if absent."""
  for place, word in enumerate(arguments):
    if word.startswith(f'--{name}='):
      return word.partition('=')[2]
    if word == f'--{name}' and place + 1 < len(arguments):
      return arguments[place + 1]
  return None


def free_port() -> int:
  """Returns a port of this machine that nobody listens on now."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


class Group:
  """Processes of one run."""

  def __init__(self, count: int, devices: int, arguments: list[str], environ: Mapping[str, str]):
    """Starts them.

    Args:
      count: how many.
      devices: host devices of each.
      arguments: of scripts/train.py.
      environ: of this process.
    """
    kept = [word for word in environ.get('XLA_FLAGS', '').split() if not word.startswith(_FLAG)]
    # Not JAX_PLATFORMS: on a machine with accelerators it is the user's choice.
    given = {**environ, 'XLA_FLAGS': ' '.join([*kept, f'{_FLAG}{devices}'])}
    given['PYTHONPATH'] = ':'.join([str(ROOT), *filter(None, [environ.get('PYTHONPATH')])])
    given['PYTHONUNBUFFERED'] = '1'
    common = [sys.executable, str(ROOT / 'scripts/train.py'), *arguments]
    if count > 1:
      common += [f'--coordinator=127.0.0.1:{free_port()}', f'--process_count={count}']
    self._ends: dict[int, tuple[float, int]] = {}
    self._lines = [collections.deque[str](maxlen=SHOWN_LINES) for _ in range(count)]
    self.processes: list[subprocess.Popen[str]] = []
    self._threads = []
    for index in range(count):
      process = subprocess.Popen(
        common + ([f'--process_index={index}'] if count > 1 else []),
        env=given,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
        # A Ctrl-C at the terminal comes to this process alone, which passes it on.
        start_new_session=True,
      )
      self.processes.append(process)
      thread = threading.Thread(target=self._follow, args=(index,), daemon=True)
      thread.start()
      self._threads.append(thread)

  def _follow(self, index: int) -> None:
    """Prints what the first process says, keeps the last lines of each, and notes its end."""
    process = self.processes[index]
    assert process.stdout is not None
    for line in process.stdout:
      self._lines[index].append(line.rstrip())
      if index == 0:
        sys.stdout.write(line)
        sys.stdout.flush()
    # A process that has turned to its log closes this long before its end.
    code = process.wait()
    self._ends[index] = (time.monotonic(), code)

  def wait(self, stop: Relay, grace_seconds: float) -> Death | None:
    """Waits until all have ended; ends those that outlive another by too much.

    Args:
      stop: a signal to pass on once it comes.
      grace_seconds: how long processes may live on after one died.

    Returns:
      Who died; None where all ended with code 0.
    """
    passed_on = False
    deadline: float | None = None
    while any(thread.is_alive() for thread in self._threads):
      if stop.number is not None and not passed_on:
        self.send(stop.number)
        passed_on = True
      if deadline is None and any(code for _, code in self._ends.values()):
        deadline = time.monotonic() + grace_seconds
      if deadline is not None and time.monotonic() > deadline:
        self.send(signal.SIGKILL)
      time.sleep(_POLL_SECONDS)
    bad = [(when, index, code) for index, (when, code) in self._ends.items() if code]
    if not bad:
      return None
    when, first, code = min(bad)
    return Death(
      index=first,
      code=code,
      lines=tuple(self._lines[first]),
      others={index: code for index, (_, code) in self._ends.items() if index != first},
      seconds=max(end for end, _ in self._ends.values()) - when,
    )

  def send(self, number: int) -> None:
    """Sends a signal to all that still run."""
    for process in self.processes:
      if process.poll() is None:
        process.send_signal(number)
