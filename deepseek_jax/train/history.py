"""What a run left in its folder, read back: for the report, for pictures and for comparisons."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.train import environment
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.metrics import JsonLines
from deepseek_jax.train.workdir import Workdir

Rows = Sequence[Mapping[str, Any]]
LOAD_COLOURS = ('#08306b', '#6baed6', '#f4f4f2', '#f0a35e', '#8c3a00')
"""Idle, equal share, busy: blue against orange with a light middle, for any colour vision."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
  """A run as its files tell it; what is absent is empty.

  Attributes:
    path: the folder.
    experiment: what runs; None where `config.json` is absent or cannot be read.
    rows: of `metrics.jsonl`.
    evaluations: of `evaluations.jsonl`.
    samples: of `samples.jsonl`.
    faults: of `faults.jsonl`.
    events: of `events.jsonl`: starts, resumes and ends.
    yardsticks: bits per byte of other compressors of the held-out text, by name.
    environment: versions, machine, devices.
    problems: what could not be read, one message each.
  """

  path: pathlib.Path
  experiment: Experiment | None
  rows: Rows = ()
  evaluations: Rows = ()
  samples: Rows = ()
  faults: Rows = ()
  events: Rows = ()
  yardsticks: Mapping[str, float] = dataclasses.field(default_factory=dict)
  environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  problems: tuple[str, ...] = ()

  @property
  def name(self) -> str:
    """The experiment's name, or the folder's."""
    return self.experiment.name if self.experiment else self.path.resolve().name

  @property
  def step(self) -> int:
    """The last step that was logged, 0 before the first."""
    return max((row['step'] for row in self.rows), default=0)


def read_history(path: pathlib.Path) -> History:
  """Reads a run's folder, as far as it can be read.

  Args:
    path: the folder of a run: finished, going on, or killed.

  Raises:
    ConfigError: there is no run in the folder.
  """
  workdir = Workdir(path)
  metrics = path / 'metrics.jsonl'
  if not workdir.config.exists() and not metrics.exists():
    raise ConfigError(f'{path}: no run here (neither config.json nor metrics.jsonl)')
  problems: list[str] = []

  def attempt[T](read: Callable[[], T], otherwise: T) -> T:
    try:
      return read()
    except ConfigError as error:
      problems.extend(error.messages)
    except (OSError, ValueError) as error:
      problems.append(str(error))
    return otherwise

  def lines(name: str) -> list[dict[str, Any]]:
    return attempt(JsonLines(path / f'{name}.jsonl').read, [])

  if not workdir.config.exists():
    problems.append(f'{workdir.config}: there is no such file')
  return History(
    path=path,
    experiment=attempt(workdir.read, None) if workdir.config.exists() else None,
    rows=lines('metrics'),
    evaluations=lines('evaluations'),
    samples=lines('samples'),
    faults=lines('faults'),
    events=lines('events'),
    yardsticks=attempt(lambda: _read_yardsticks(path / 'yardsticks.json'), {}),
    environment=environment.read(path / 'environment.json'),
    problems=tuple(problems),
  )


def _read_yardsticks(path: pathlib.Path) -> dict[str, float]:
  if not path.exists():
    return {}
  content = json.loads(path.read_text(encoding='utf-8'))
  if not isinstance(content, dict):
    raise ConfigError(f'{path}: expected names and numbers, found {type(content).__name__}')
  return {str(name): float(value) for name, value in content.items()}


def column(rows: Rows, key: str) -> np.ndarray:
  """One number of every row.

  Args:
    rows: the rows of a JSON-lines file.
    key: which number.

  Returns:
    float64 [rows]; NaN where the number is null, absent or no number.
  """
  values = [row.get(key) for row in rows]
  return np.array([x if isinstance(x, (int, float)) else math.nan for x in values], np.float64)


def layer_column(
  rows: Rows, key: str, reduce: Callable[[np.ndarray], float] = np.max
) -> np.ndarray:
  """One number of every row out of a list with an entry a layer.

  Args:
    rows: the rows of `metrics.jsonl`.
    key: which list.
    reduce: from the layers' numbers to one.

  Returns:
    float64 [rows]; NaN where the list is absent or has no number.
  """
  values = []
  for row in rows:
    known = [x for x in row.get(key) or () if isinstance(x, (int, float))]
    values.append(float(reduce(np.array(known, np.float64))) if known else math.nan)
  return np.array(values, np.float64)


def loss_key(rows: Rows) -> str:
  """Which number says how good the run is: bits per byte, or the loss where none was measured."""
  return 'bits_per_byte' if np.isfinite(column(rows, 'bits_per_byte')).any() else 'loss'


def smooth(values: np.ndarray, window: int) -> np.ndarray:
  """Centred running mean that leaves out what is not finite and shortens at the ends.

  Args:
    values: float64 [n].
    window: how many neighbours are averaged.

  Returns:
    float64 [n]; NaN where no neighbour is finite.
  """
  if not len(values):
    return values
  finite = np.isfinite(values)
  kernel = np.ones(max(1, min(window, len(values))))
  total = np.convolve(np.where(finite, values, 0.0), kernel, 'same')
  count = np.convolve(finite.astype(np.float64), kernel, 'same')
  return np.divide(total, count, out=np.full(len(values), math.nan), where=count > 0.5)


def recent(values: np.ndarray) -> float:
  """Mean of the last twentieth of a column that is finite; NaN where nothing is.

  Args:
    values: float64 [n].
  """
  known = values[np.isfinite(values)]
  return float(known[-max(1, len(known) // 20) :].mean()) if known.size else math.nan


def shown_range(curves: Sequence[np.ndarray], levels: Sequence[float]) -> tuple[float, float]:
  """What a plot of losses shows: everything but the first steps, which are far above the rest.

  Args:
    curves: float64 [n] each, the smoothed training loss first.
    levels: other values to be seen.

  Returns:
    Lowest and highest value, with a margin.
  """
  known = np.concatenate([*curves, np.array(list(levels), np.float64)])
  known = known[np.isfinite(known)]
  if not known.size:
    return 0.0, 1.0
  settled = curves[0][len(curves[0]) // 12 :]
  settled = settled[np.isfinite(settled)]
  low = float(known.min())
  high = float(max([*levels, settled.max() if settled.size else known.max()]))
  margin = 0.08 * max(high - low, 0.1)
  return low - margin, high + margin


def thin(x: np.ndarray, y: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
  """Fewer points that draw the same line: the lowest and highest of each stretch are kept.

  Args:
    x: float64 [n], rising.
    y: float64 [n]; NaN is a gap and stays one.
    most: points to keep, about.

  Returns:
    Both, shortened.
  """
  if len(x) <= most:
    return x, y
  keep = {0, len(x) - 1}
  for part in np.array_split(np.arange(len(x)), max(1, most // 2)):
    finite = part[np.isfinite(y[part])]
    if len(finite) < len(part):
      keep.add(int(part[~np.isfinite(y[part])][0]))
    if len(finite):
      keep |= {int(finite[np.argmin(y[finite])]), int(finite[np.argmax(y[finite])])}
  chosen = np.array(sorted(keep))
  return x[chosen], y[chosen]


def load_table(rows: Rows) -> tuple[list[str], np.ndarray, np.ndarray]:
  """Expert loads of a run as one table.

  Args:
    rows: the rows of `metrics.jsonl`.

  Returns:
    The layers' addresses; the steps, int64 [S]; and float64 [L, E, S], each expert's load over an
    equal share (1 is balanced, 0 dead), NaN where a layer has fewer experts.
  """
  rows = [row for row in rows if row.get('load')]
  layers = list(dict.fromkeys(layer for row in rows for layer in row['load']))
  layers.sort(key=lambda name: [(x.isdecimal(), x.zfill(9)) for x in name.split('/')])
  experts = max((len(row['load'][layer]) for row in rows for layer in row['load']), default=0)
  table = np.full((len(layers), experts, len(rows)), math.nan)
  for at, row in enumerate(rows):
    for layer, shares in row['load'].items():
      known = [math.nan if share is None else share for share in shares]
      table[layers.index(layer), : len(shares), at] = np.array(known) * len(shares)
  return layers, np.array([row['step'] for row in rows], np.int64), table


def wall_clock(rows: Rows) -> np.ndarray:
  """Seconds of training until each row, the pauses between a stop and a resume left out.

  Args:
    rows: the rows of `metrics.jsonl`; their `elapsed_seconds` begin anew at each start.

  Returns:
    float64 [rows]; steps that were lost with a kill and run again count once.
  """
  elapsed = column(rows, 'elapsed_seconds')
  total, last, seconds = 0.0, 0.0, np.full(len(rows), math.nan)
  for at, value in enumerate(elapsed):
    if not math.isfinite(value):
      continue
    if value < last:
      total += last
    last = value
    seconds[at] = total + value
  return seconds
