"""What a run begins with: its newest checkpoint, a snapshot that is newer still, or nothing."""

import dataclasses
import functools
from collections.abc import Callable

from deepseek_jax.sharding.agreement import from_first
from deepseek_jax.train import events
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.display import Display
from deepseek_jax.train.initialise import resume_state
from deepseek_jax.train.recover import recover
from deepseek_jax.train.snapshot import Snapshots
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.step import Program
from deepseek_jax.train.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Restart:
  """Where a run goes on.

  Attributes:
    step: finished steps; 0 for a new run.
    words: the same for a reader.
    restore: reads the state, in all processes together; None for a new run.
  """

  step: int
  words: str
  restore: Callable[[], TrainState] | None


def find_restart(
  program: Program,
  workdir: Workdir,
  checkpoints: Checkpoints,
  snapshots: Snapshots | None,
  display: Display,
) -> Restart:
  """Finds the newest state that is whole, alike in all processes.

  Args:
    program: the functions of the run.
    workdir: its folder; damaged checkpoints in it are set aside.
    checkpoints: of the run.
    snapshots: of the run, if it keeps any.
    display: what the terminal shows.

  Raises:
    ConfigError: there are checkpoints and all are damaged.
  """
  saved = from_first(lambda: recover(workdir, display))
  newer = 0 if snapshots is None else snapshots.newest(saved, program.abstract_state)
  if snapshots is not None and newer:
    restore = functools.partial(snapshots.restore, newer, program.abstract_state)
    # Who noted the start knew of checkpoints only.
    note = functools.partial(events.record, workdir.path, newer, 'resumed', 'from snapshots')
    from_first(note)
    return Restart(newer, f'going on after step {newer}, from snapshots …', restore)
  if saved:
    restore = functools.partial(resume_state, program, checkpoints, saved, display.message)
    return Restart(saved, f'going on after step {saved} …', restore)
  return Restart(0, 'compiling the training step …', None)
