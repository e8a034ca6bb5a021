"""Being asked to stop, and work that must not keep the main thread from hearing it."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Protocol


class StoppedEarlyError(Exception):
  """The run was asked to stop before it had anything to save."""


class Asked(Protocol):
  """Knows whether the run is to stop."""

  @property
  def requested(self) -> str | None:
    """Why, or None."""


class Stop:
  """Notes SIGTERM and SIGINT instead of dying; a second SIGINT dies as usual.

  Attributes:
    requested: the name of the signal that came, or None.
  """

  def __init__(self):
    """Installs nothing yet."""
    self.requested: str | None = None
    self._earlier: dict[int, object] = {}

  def __enter__(self) -> 'Stop':
    """Installs the handlers, where this is the main thread."""
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._earlier[number] = signal.signal(number, self._note)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    """Brings the earlier handlers back."""
    for number, handler in self._earlier.items():
      signal.signal(number, handler)  # type: ignore[arg-type]

  def _note(self, number: int, frame: FrameType | None) -> None:
    if self.requested is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.requested = signal.Signals(number).name


def in_background[Result](work: Callable[[], Result], stop: Asked) -> Result:
  """Runs `work` in another thread and waits; Python hears signals in its main thread only.

  Compilation is one long call into C++ that would hold a signal back for minutes.

  Raises:
    StoppedEarlyError: a signal came first. The work goes on in a daemon thread: the caller is to
      leave the process soon, with `os._exit`.
  """
  results: list[Result] = []
  errors: list[BaseException] = []

  def run() -> None:
    try:
      results.append(work())
    except BaseException as error:  # handed to the waiting thread
      errors.append(error)

  thread = threading.Thread(target=run, name='compilation', daemon=True)
  thread.start()
  while thread.is_alive():
    thread.join(0.1)
    if stop.requested is not None:
      raise StoppedEarlyError(stop.requested)
  if errors:
    raise errors[0]
  return results[0]
