"""The folder of a sweep: `sweep.json`, which says what runs there, and the runs' folders.

`DIR/<variant>/seed_<n>/` is the folder of a run like any other; `DIR/logs/` has what its process
printed, `DIR/compiled/` the compiled programs that runs share. `DIR/sweep.json`:

  question      name of the experiment's folder
  version       of deepseek_jax; results of another version are refused
  baseline      what others are compared with: see deepseek_jax/lab/groups.py
  match         how steps were made to compare, as Python; null where they were not
  seeds         every seed that was ever asked for; each sets `seed` and `data.shuffle_seed`
  precision     what Fastest() was measured to be, the same for all runs; null where none asks
  platform      of the devices that the sweep was checked on: cpu, gpu, tpu
  variants      name → of each, in order:
    changes       where it differs from the sweep's base, as text: `path: old → new`
    values        dotted path → value as Python: the coordinates of the variant
    train_steps   of its runs
    matched       {cost, asked_steps, steps}, or null; the unit of cost is that of `match`
    asked         digest of its config before steps were matched
    config        digest of the config that runs, with the base's seed
    experiment    that config as JSON

A run that is not `finished` by `status_of` is part of no result: it was killed, stopped, or failed
with the reason in its `events.jsonl`. Kinds that the question itself defines are found where its
file was imported, by `read_question` or by its dotted name.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any, Literal

import deepseek_jax
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.difference import difference
from deepseek_jax.core.override import override
from deepseek_jax.core.serialise import digest, from_json, to_json
from deepseek_jax.core.sweep import SEED_PATHS
from deepseek_jax.lab.match import Matched
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.metrics import JsonLines
from deepseek_jax.train.workdir import Workdir

NAME = 'sweep.json'
Kind = Literal['waiting', 'unfinished', 'stopped', 'failed', 'finished']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
  """A variant as it runs.

  Attributes:
    name: of the variant and its folder.
    changes: where it differs from the base, one text each.
    values: dotted path → value as Python.
    asked: digest of its config before steps were matched.
    matched: what was adjusted, or None.
    experiment: the config that runs, with the base's seed.
  """

  name: str
  changes: tuple[str, ...]
  values: dict[str, str]
  asked: str
  matched: Matched | None
  experiment: Experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What `sweep.json` says.

  Attributes:
    question: name of the experiment's folder.
    baseline: what others are compared with; see `groups`.
    match: how steps were made to compare, as Python, or None.
    seeds: every seed that was ever asked for.
    precision: what `Fastest` was measured to be, or None where no variant asks.
    platform: of the devices that the sweep was checked on.
    variants: in order.
    version: of deepseek_jax.
  """

  question: str
  baseline: str
  match: str | None
  seeds: tuple[int, ...]
  precision: str | None
  platform: str
  variants: tuple[Planned, ...]
  version: str = deepseek_jax.__version__


@dataclasses.dataclass(frozen=True)
class Trial:
  """One run of a sweep.

  Attributes:
    variant: its name.
    seed: of the run.
    experiment: what runs.
    workdir: its folder.
  """

  variant: str
  seed: int
  experiment: Experiment
  workdir: Workdir

  @property
  def name(self) -> str:
    """`<variant>/seed_<n>`, the folder from the sweep's."""
    return f'{self.variant}/seed_{self.seed}'

  @property
  def log(self) -> pathlib.Path:
    """What its process printed; beside it, with the ending `.lock`, what it holds as it runs."""
    folder = self.workdir.path.parents[1] / 'logs'
    return folder / f'{self.variant}.seed_{self.seed}.log'


@dataclasses.dataclass(frozen=True)
class Status:
  """How far a run is, by its files.

  Attributes:
    kind: 'unfinished' was killed, or is going on.
    step: the last that was logged or noted.
    reason: of a failure or a stop, or None.
  """

  kind: Kind
  step: int
  reason: str | None = None


def trials_of(plan: Plan, folder: pathlib.Path, seeds: tuple[int, ...]) -> list[Trial]:
  """Lists the runs: every variant with the first seed, then every variant with the next.

  Args:
    plan: of the sweep.
    folder: of the sweep.
    seeds: which of the plan's.
  """
  return [
    Trial(
      variant.name,
      seed,
      override(variant.experiment, dict.fromkeys(SEED_PATHS, seed))[0],
      Workdir(folder / variant.name / f'seed_{seed}'),
    )
    for seed in seeds
    for variant in plan.variants
  ]


def status_of(trial: Trial) -> Status:
  """Says how far a run is.

  Raises:
    ConfigError: a line of its files is no JSON.
  """
  events = JsonLines(trial.workdir.path / 'events.jsonl').read()
  if not events:
    return Status('waiting', 0)
  last = events[-1]
  if last['event'] == 'finished' and last['step'] >= trial.experiment.train_steps:
    return Status('finished', last['step'])
  rows = JsonLines(trial.workdir.path / 'metrics.jsonl').read()
  step = max([last['step'], *(row['step'] for row in rows[-1:])])
  if last['event'] in ('failed', 'stopped'):
    return Status(last['event'], step, last.get('reason'))
  return Status('unfinished', step)


def read_plan(folder: pathlib.Path) -> Plan | None:
  """Reads `sweep.json`, or returns None where there is none.

  Raises:
    ConfigError: it cannot be read, or is of another version.
  """
  path = folder / NAME
  try:
    data = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    raise ConfigError(f'{path}: {error}') from error
  version = data.get('version') if isinstance(data, dict) else None
  if version != deepseek_jax.__version__:
    raise ConfigError(
      f'{path}: these results are of deepseek_jax {version}, this is {deepseek_jax.__version__}; '
      'runs of two versions do not compare: start in another --output'
    )
  try:
    return _decode(data)
  except (KeyError, TypeError, AttributeError) as error:
    raise ConfigError(f'{path}: not written by a sweep: {type(error).__name__}: {error}') from error
  except ConfigError as error:
    raise ConfigError(f'{path}: {message}' for message in error.messages) from error


def write_plan(folder: pathlib.Path, plan: Plan) -> None:
  """Writes `sweep.json` whole, unless it says the same already.

  Raises:
    ConfigError: the folder cannot be written, or a config cannot be saved.
  """
  text = json.dumps(_encode(plan), indent=2, ensure_ascii=False) + '\n'
  path = folder / NAME
  # Jobs of an array may all do this at once.
  fresh = folder / f'{NAME}.{os.getpid()}.new'
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text(encoding='utf-8') == text:
      return
    fresh.write_text(text, encoding='utf-8')
    os.replace(fresh, path)
  except OSError as error:
    raise ConfigError(f'{path}: {error.strerror}') from error


def check_same(kept: Plan, plan: Plan, folder: pathlib.Path) -> None:
  """Refuses a plan that would put other runs beside those that are there.

  More variants and more seeds are welcome.

  Args:
    kept: what `sweep.json` says.
    plan: what is asked for.
    folder: of the sweep.

  Raises:
    ConfigError: with every difference.
  """
  new = {variant.name: variant for variant in plan.variants}
  errors = []
  for old in kept.variants:
    if not any(Workdir(path).trained for path in (folder / old.name).glob('seed_*')):
      continue  # nothing was trained that could be mixed up
    if old.name not in new:
      errors.append(f'{old.name}: has runs here, and is no longer a variant')
    else:
      changes = difference(old.experiment, new[old.name].experiment)
      errors += [f'{old.name}: {change}' for change in changes]
  if errors:
    errors.append(f'{folder} holds runs of other configs: start in another --output')
    raise ConfigError(errors)


def _encode(plan: Plan) -> dict[str, Any]:
  variants = {
    variant.name: {
      'changes': list(variant.changes),
      'values': variant.values,
      'train_steps': variant.experiment.train_steps,
      'matched': None if variant.matched is None else dataclasses.asdict(variant.matched),
      'asked': variant.asked,
      'config': digest(variant.experiment),
      'experiment': to_json(variant.experiment),
    }
    for variant in plan.variants
  }
  head = {
    name: getattr(plan, name)
    for name in ('question', 'version', 'baseline', 'match', 'seeds', 'precision', 'platform')
  }
  return {**head, 'seeds': list(plan.seeds), 'variants': variants}


def _decode(data: dict[str, Any]) -> Plan:
  variants = tuple(
    Planned(
      name=name,
      changes=tuple(part['changes']),
      values=part['values'],
      asked=part['asked'],
      matched=None if part['matched'] is None else Matched(**part['matched']),
      experiment=from_json(part['experiment']),
    )
    for name, part in data['variants'].items()
  )
  head = {key: data[key] for key in ('question', 'baseline', 'match', 'precision', 'platform')}
  return Plan(**head, seeds=tuple(data['seeds']), variants=variants, version=data['version'])
