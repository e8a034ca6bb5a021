"""The folder of a run: what is in it, and whether a run may go on in it."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.precision import Fastest
from deepseek_jax.core.serialise import Change, difference, from_json, to_json, to_module
from deepseek_jax.train.display import Display
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.metrics import DisplayOnly, JsonLines, MetricWriter, NoRows

FATAL = ('model', 'data', 'seed', 'optimizer', 'init_from')
"""Parts of an experiment that a run in progress cannot change: its state would not fit, or its
data would start over; what it began with is past."""


@dataclasses.dataclass(frozen=True)
class Workdir:
  """Paths of a run.

  Attributes:
    path: the folder.
  """

  path: pathlib.Path

  @property
  def config(self) -> pathlib.Path:
    """The experiment as JSON."""
    return self.path / 'config.json'

  @property
  def checkpoints(self) -> pathlib.Path:
    """The folder of checkpoints."""
    return self.path / 'checkpoints'

  @property
  def evaluations(self) -> pathlib.Path:
    """Held-out figures, one JSON object a line."""
    return self.path / 'evaluations.jsonl'

  @property
  def samples(self) -> pathlib.Path:
    """Continuations of the prompts, one JSON object a line."""
    return self.path / 'samples.jsonl'

  @property
  def init_from(self) -> pathlib.Path:
    """What of another run's checkpoint this run began with, as JSON."""
    return self.path / 'init_from.json'

  @property
  def faults(self) -> pathlib.Path:
    """What went wrong and was survived, one JSON object a line: `step`, `kind`, `message`."""
    return self.path / 'faults.jsonl'

  @property
  def placements(self) -> pathlib.Path:
    """How even the devices' loads were and became when experts were placed, one JSON a line."""
    return self.path / 'placements.jsonl'

  def log(self, index: int) -> pathlib.Path:
    """What process `index` of several has to say."""
    return self.path / 'logs' / f'process_{index}.log'

  def rows(self, path: pathlib.Path) -> JsonLines:
    """Returns one of the logs above, to be written."""
    return JsonLines(path)

  def writer(self, display: Display) -> MetricWriter:
    """Returns what writes a step's numbers."""
    return MetricWriter(self.path, display)

  @property
  def trained(self) -> bool:
    """Whether a step was logged or a checkpoint saved here."""
    log = self.path / 'metrics.jsonl'
    logged = log.is_file() and log.stat().st_size > 0
    return logged or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir()))

  def read(self) -> Experiment | None:
    """Returns the experiment that runs here, or None where there is none yet.

    Raises:
      ConfigError: the folder holds something else, or cannot be read.
    """
    try:
      if self.path.exists() and not self.path.is_dir():
        raise ConfigError(f'workdir {self.path} is a file; expected a folder')
      if not self.config.exists():
        # A crash in the first write leaves a file that was not yet put in place.
        if self.path.exists() and any(p.suffix != '.new' for p in self.path.iterdir()):
          raise ConfigError(
            f'workdir {self.path} is not empty and has no config.json; expected an empty folder '
            'or an earlier run'
          )
        return None
      content = json.loads(self.config.read_text(encoding='utf-8'))
    except OSError as error:
      raise ConfigError(f'workdir {self.path}: {error.strerror}') from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
      raise ConfigError(f'{self.config}: not JSON: {error}') from error
    try:
      found = from_json(content)
    except ConfigError as error:
      raise ConfigError(f'{self.config}: {message}' for message in error.messages) from None
    if not isinstance(found, Experiment):
      raise ConfigError(f'{self.config}: expected an Experiment, found {type(found).__name__}')
    return found

  def write(self, experiment: Experiment) -> None:
    """Writes `config.json`, and `config.py` that repeats the run."""
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      _replace(self.config, json.dumps(to_json(experiment), indent=2) + '\n')
      _replace(self.path / 'config.py', to_module(experiment))
    except OSError as error:
      raise ConfigError(f'workdir {self.path}: {error.strerror}') from error


class Follower(Workdir):
  """The same folder for the second and every further process: the first writes for all."""

  def rows(self, path: pathlib.Path) -> JsonLines:
    """Returns a log that nothing comes to."""
    return NoRows(path)

  def writer(self, display: Display) -> MetricWriter:
    """Returns what shows a step's numbers, and writes none."""
    return DisplayOnly(self.path, display)


def compare(old: Experiment, new: Experiment) -> list[Change]:
  """Lists what a run would change, and refuses what it cannot.

  Args:
    old: the experiment of the workdir.
    new: the experiment asked for; a precision still to be measured takes the old one.

  Raises:
    ConfigError: a fatal part differs.
  """
  if isinstance(new.precision, Fastest):
    new = dataclasses.replace(new, precision=old.precision)
  changes = difference(old, new)
  parts = set(FATAL)
  # An edited guard or average goes on with the numbers of the old one; a new one has none.
  for name in ('guard', 'ema'):
    if (getattr(old, name) is None) != (getattr(new, name) is None):
      parts.add(name)
  fatal = [change for change in changes if change.path.split('.')[0] in parts]
  if fatal:
    raise ConfigError(
      [
        *(f'{change} — the run in this workdir cannot change that' for change in fatal),
        'start in another --workdir, or ask for what the run began with',
      ]
    )
  return changes


def write_json(path: pathlib.Path, content: Any) -> None:
  """Replaces a JSON file whole."""
  _replace(path, json.dumps(content, indent=2) + '\n')


def _replace(path: pathlib.Path, text: str) -> None:
  fresh = path.with_name(path.name + '.new')
  fresh.write_text(text, encoding='utf-8')
  os.replace(fresh, path)
