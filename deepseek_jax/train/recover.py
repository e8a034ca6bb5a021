"""Where a run goes on: at its newest whole checkpoint, with damaged ones set aside."""

import pathlib

from deepseek_jax.core.config import ConfigError
from deepseek_jax.train.checkpoint_reader import saved_steps
from deepseek_jax.train.display import Display
from deepseek_jax.train.metrics import JsonLines
from deepseek_jax.train.seal import find_damage, find_obvious_damage
from deepseek_jax.train.workdir import Workdir


def recover(workdir: Workdir, display: Display) -> int:
  """Finds the newest whole checkpoint, and moves damaged ones out of the way.

  A damaged checkpoint is kept as `<step>.damaged`, so that the run can save that step again and a
  reader can still look into it. What happened is shown, and written to `faults.jsonl` under the
  step that the run goes on after.

  Args:
    workdir: the folder of the run.
    display: what the terminal shows.

  Returns:
    The step to go on after; 0 where nothing has been saved.

  Raises:
    ConfigError: there are checkpoints and all are damaged; nothing has been moved.
  """
  faults: dict[int, str] = {}
  whole = 0
  for step in reversed(saved_steps(workdir.checkpoints)):
    path = workdir.checkpoints / str(step)
    # Of older ones the JSON is enough: Orbax reads that of all of them whenever it saves.
    fault = find_obvious_damage(path) if whole else find_damage(path)
    if fault is not None:
      faults[step] = fault
    elif not whole:
      whole = step
  if faults and not whole:
    raise ConfigError(
      [
        *(f'{workdir.checkpoints / str(step)}: damaged: {fault}' for step, fault in faults.items()),
        'every checkpoint of this run is damaged; nothing was changed: bring one back from a copy, '
        'or start in another --workdir',
      ]
    )
  for step, fault in faults.items():
    aside = set_aside(workdir.checkpoints / str(step))
    message = (
      f'checkpoint {step} is damaged ({fault}): kept as {aside.name}; going on after step {whole}'
    )
    row = {'step': whole, 'kind': 'damaged_checkpoint', 'message': message}
    JsonLines(workdir.faults).append(row)
    display.message(message)
  return whole


def set_aside(path: pathlib.Path) -> pathlib.Path:
  """Renames a folder to `<name>.damaged`, or `<name>.damaged.2` and so on; returns the new path."""
  aside, number = path.with_name(f'{path.name}.damaged'), 1
  while aside.exists():
    number += 1
    aside = path.with_name(f'{path.name}.damaged.{number}')
  path.rename(aside)
  return aside
