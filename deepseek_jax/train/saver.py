"""Saving while training: a full disk costs a warning first, and the run only if it stays full."""

from collections.abc import Callable
from typing import Any

from deepseek_jax.core.serialise import to_json
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.disk import DiskFullError, check_room
from deepseek_jax.train.display import Display
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.workdir import Workdir

MOST_FAILURES = 2
"""Failed saves in a row that end the run. After one it goes on, since room may be made until the
next; after more, what is computed is more and more likely to be lost."""


class Saver:
  """Saves a run's states; what fails for lack of room is told, written down and tried again."""

  def __init__(
    self, experiment: Experiment, workdir: Workdir, checkpoints: Checkpoints, display: Display
  ):
    """Remembers where things go; touches no file.

    Args:
      experiment: what runs.
      workdir: its folder.
      checkpoints: where states are saved.
      display: what the terminal shows.
    """
    self._experiment, self._workdir = experiment, workdir
    self._checkpoints, self._display = checkpoints, display
    self._failures: list[DiskFullError] = []

  def check_room(self, state: Any) -> None:
    """Refuses to begin where not even one checkpoint fits; warns where not all will.

    Args:
      state: pytree of shapes and dtypes.

    Raises:
      DiskFullError: there is no room for one checkpoint.
    """
    # The newest, the best, and the one that is being written.
    kept, present = self._experiment.cadence.keep + 2, len(self._checkpoints.steps())
    warning = check_room(self._checkpoints.directory, state, kept, present)
    if warning is not None:
      self._display.message(f'warning: {warning}')

  def save(self, step: int, state: TrainState, bits_per_byte: float | None) -> None:
    """Starts saving a state; see `Checkpoints.save`.

    Args:
      step: the number of finished steps.
      state: what to save.
      bits_per_byte: held-out figure that ranks the checkpoint, or None.

    Raises:
      DiskFullError: there was no room, and it was not the first time in a row.
    """
    if step in self._checkpoints:
      return
    if self._checkpoints.saving and self._attempt(self._checkpoints.wait):
      self._failures = []
    metrics = {} if bits_per_byte is None else {'bits_per_byte': bits_per_byte}
    config = to_json(self._experiment)
    self._attempt(lambda: self._checkpoints.save(step, state, {'step': step}, config, metrics))

  def finish(self) -> None:
    """Waits until the last state is on disk.

    Raises:
      DiskFullError: it is not: there was no room.
    """
    if self._checkpoints.saving:
      try:
        self._checkpoints.wait()
        self._failures = []
      except DiskFullError as error:
        self._failures.append(error)
    if self._failures:
      raise self._explained(self._failures[-1])

  def _attempt(self, work: Callable[[], None]) -> bool:
    """Does work that may find the disk full; whether it did not."""
    try:
      work()
      return True
    except DiskFullError as error:
      self._failures.append(error)
      if len(self._failures) >= MOST_FAILURES:
        raise self._explained(error) from error
      # Under a step that a later run will not go back behind, so that it stays in the log.
      row = {'step': self._checkpoints.latest() or 0, 'kind': 'full_disk', 'message': str(error)}
      self._workdir.rows(self._workdir.faults).append(row)
      self._display.message(f'warning: {error}; not saved, trying again at the next save')
      return False

  def _explained(self, error: DiskFullError) -> DiskFullError:
    """The error with what is left of the run."""
    newest = self._checkpoints.latest()
    left = 'no step was saved' if newest is None else f'the run can go on after step {newest}'
    return DiskFullError([*error.messages, f'{self._workdir.path}: {left}, once there is room'])
