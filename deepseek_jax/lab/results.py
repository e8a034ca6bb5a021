"""What a sweep found: every run's figures and curves in one JSON file that can be committed.

`results.json` is all that tables, pictures and pages are made of:

  question, version, baseline, match, precision, platform   as in `sweep.json`
  figure        what decides: 'bits_per_byte' where all runs have it, else 'loss'; held out
  variants      name → of each, in order:
    changes       where it differs from the sweep's base
    values        dotted path → value as Python
    train_steps   of its runs
    asked_steps   what its config asked for before steps were matched
    parameters    of the model
    active        parameters that a token is multiplied with
    flops         training FLOPs of a whole run
    runs          seed → {status, step, reason, figures, curve}

A run's status is `finished`, `diverged`, `failed` or `unfinished`. `figures` are numbers of the
last evaluation and of the last twentieth of training, and where `scripts/evaluate.py` has measured
a run on media, means over its sources of what it wrote and figures of each, as `Questions/exact`;
`curve` is two columns.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import deepseek_jax
from deepseek_jax.core.config import ConfigError
from deepseek_jax.lab.sweep_file import Planned, Trial, read_plan, status_of, trials_of
from deepseek_jax.models.cost import active_parameters
from deepseek_jax.train.faults import SkippedStepsError
from deepseek_jax.train.history import (
  History,
  column,
  layer_column,
  read_history,
  recent,
  thin,
)
from deepseek_jax.train.page.curves import smoothed_loss
from deepseek_jax.train.step import build_program
from deepseek_jax.train.summary import experiment_weights, step_flops

NAME = 'results.json'
POINTS = 120
"""Most points that a curve keeps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """One seed of a variant.

  Attributes:
    status: 'finished', 'diverged', 'failed' or 'unfinished'.
    step: the last that was logged.
    reason: of a failure or a stop, or None.
    figures: name → number; empty where it did not finish.
    curve: columns `step` and `value`, the training loss, smoothed and thinned.
  """

  status: str
  step: int
  reason: str | None
  figures: Mapping[str, float]
  curve: Mapping[str, list[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariantResult:
  """A variant and its runs; see the head of the file.

  Attributes:
    changes: where it differs from the sweep's base.
    values: dotted path → value as Python.
    train_steps: of its runs.
    asked_steps: what its config asked for before steps were matched.
    parameters: of the model.
    active: parameters that a token is multiplied with.
    flops: training FLOPs of a whole run.
    runs: by seed.
  """

  changes: tuple[str, ...]
  values: Mapping[str, str]
  train_steps: int
  asked_steps: int
  parameters: int
  active: int
  flops: float
  runs: Mapping[int, Run]

  def finished(self, figure: str) -> dict[int, float]:
    """Returns the figure of every finished run that has it, by seed."""
    return {
      seed: run.figures[figure]
      for seed, run in self.runs.items()
      if run.status == 'finished' and figure in run.figures
    }

  def count(self, status: str) -> int:
    """Returns how many runs ended so."""
    return sum(run.status == status for run in self.runs.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
  """A whole sweep; see the head of the file.

  Attributes:
    question: name of the experiment's folder.
    version: of deepseek_jax that ran it.
    baseline: what others are compared with; see `groups`.
    match: how steps were made to compare, or None.
    precision: that was measured to be the fastest, or None.
    platform: of the devices.
    figure: what decides.
    variants: by name, in order.
  """

  question: str
  version: str
  baseline: str
  match: str | None
  precision: str | None
  platform: str
  figure: str
  variants: Mapping[str, VariantResult]


def collect(folder: pathlib.Path) -> Results:
  """Reads the runs of a sweep, as far as they are.

  Args:
    folder: of the sweep.

  Raises:
    ConfigError: there is no sweep, it is of another version, or no run has logged anything.
  """
  plan = read_plan(folder)
  if plan is None:
    raise ConfigError(f'{folder}: no sweep here (there is no sweep.json)')
  trials = trials_of(plan, folder, plan.seeds)
  histories = {
    trial: read_history(trial.workdir.path)
    for trial in trials
    if (trial.workdir.path / 'metrics.jsonl').exists()
  }
  if not histories:
    raise ConfigError(f'{folder}: no run of this sweep has logged a step yet')
  figure = _deciding_figure(histories)
  return Results(
    question=plan.question,
    version=plan.version,
    baseline=plan.baseline,
    match=plan.match,
    precision=plan.precision,
    platform=plan.platform,
    figure=figure,
    variants={
      planned.name: _variant(
        planned, {t: histories.get(t) for t in trials if t.variant == planned.name}, figure
      )
      for planned in plan.variants
    },
  )


def _deciding_figure(histories: Mapping[Trial, History]) -> str:
  # Nats of two tokenizers do not compare; bits of a byte do.
  evaluated = [history.evaluations for history in histories.values() if history.evaluations]
  with_bits = all('bits_per_byte' in rows[-1] for rows in evaluated)
  return 'bits_per_byte' if with_bits else 'loss'


def _variant(planned: Planned, runs: Mapping[Trial, History | None], figure: str) -> VariantResult:
  experiment = planned.experiment
  program = build_program(experiment, jax.devices()[:1])
  weights, steps = experiment_weights(program), experiment.train_steps
  matched = planned.matched
  return VariantResult(
    changes=planned.changes,
    values=planned.values,
    train_steps=steps,
    asked_steps=steps if matched is None else matched.asked_steps,
    parameters=sum(weight.size for weight in weights),
    active=active_parameters(weights),
    flops=float(step_flops(experiment, weights).sum()),
    runs={trial.seed: _run(trial, history, figure) for trial, history in runs.items()},
  )


def _run(trial: Trial, history: History | None, figure: str) -> Run:
  status = status_of(trial)
  if history is None:
    return Run(
      status='failed' if status.kind == 'failed' else 'unfinished',
      step=status.step,
      reason=status.reason,
      figures={},
      curve={},
    )
  kind: str = status.kind if status.kind in ('finished', 'failed') else 'unfinished'
  reason = status.reason
  figures = _figures(history) | _media_figures(trial) if kind == 'finished' else {}
  fault = _divergence(history, status.reason, figures if kind == 'finished' else None, figure)
  if fault is not None:
    kind, reason = 'diverged', fault
  return Run(
    status=kind,
    step=status.step,
    reason=reason,
    figures=figures if kind == 'finished' else {},
    curve=_curve(history),
  )


def _divergence(
  history: History, reason: str | None, figures: Mapping[str, float] | None, figure: str
) -> str | None:
  """Says why a run's figures mean nothing, or returns None where they mean something."""
  losses = column(history.rows, 'loss')
  if losses.size and not np.isfinite(losses[-1]):
    return f'the loss of step {history.step} is not finite'
  if (reason or '').startswith(SkippedStepsError.__name__):
    return 'the guard skipped too many steps in a row'
  if figures is not None and figure not in figures:
    return 'its held-out loss is not finite'
  if losses.size > 20 and recent(losses) >= losses[0]:
    return 'its loss is no lower than at its first step'
  return None


def _figures(history: History) -> dict[str, float]:
  """Numbers of the last evaluation, and means of the last twentieth of training."""
  found: dict[str, float] = {}
  if history.evaluations:
    # What was not finite is null in the file.
    for name in ('loss', 'bits_per_byte', 'accuracy', 'mtp_loss', 'mtp_acceptance'):
      found[name] = float(column(history.evaluations, name)[-1])
  rows = history.rows
  for name, values in (
    ('train_loss', column(rows, 'loss')),
    ('train_mtp_loss', column(rows, 'mtp_loss')),
    ('max_violation', layer_column(rows, 'max_violation')),
    ('dead_experts', layer_column(rows, 'dead_fraction')),
    ('load_entropy', layer_column(rows, 'load_entropy', np.min)),
    ('drop_rate', layer_column(rows, 'drop_rate')),
  ):
    found[name] = recent(values)
  speeds = column(rows, 'tokens_per_second')
  if np.isfinite(speeds).any():
    found['tokens_per_second'] = float(np.nanmedian(speeds))
  return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def _media_figures(trial: Trial) -> dict[str, float]:
  """Figures of `media.json`, which is there where a run was measured on media.

  Means over the sources by name, and those of each source, as `Questions/exact`.
  """
  path = trial.workdir.path / 'media.json'
  if not path.exists():
    return {}
  sources = json.loads(path.read_text(encoding='utf-8'))['sources']
  values = defaultdict(list)
  for figures in sources.values():
    for name, value in figures.items():
      values[name].append(value)
  found = {name: float(np.mean(values[name])) for name in sorted(values)}
  own = {
    f'{source}/{name}': float(value)
    for source, figures in sources.items()
    for name, value in figures.items()
  }
  return found | own


def _curve(history: History) -> dict[str, list[float]]:
  losses = smoothed_loss(column(history.rows, 'loss'))
  known = np.isfinite(losses)
  steps, values = thin(column(history.rows, 'step')[known], losses[known], POINTS)
  return {'step': [int(step) for step in steps], 'value': [round(float(v), 5) for v in values]}


def write_results(path: pathlib.Path, results: Results) -> None:
  """Writes `results.json`."""
  path.write_bytes(_encode(results))


def digest(results: Results) -> str:
  """Returns the SHA-256 of `results.json` as `write_results` writes it, in hexadecimal."""
  return hashlib.sha256(_encode(results)).hexdigest()


def _encode(results: Results) -> bytes:
  data = dataclasses.asdict(results)
  return (json.dumps(data, indent=1, ensure_ascii=False) + '\n').encode()


def read_results(path: pathlib.Path) -> Results:
  """Reads `results.json`.

  Raises:
    ConfigError: it is not there, was not written by `write_results`, or is of another version.
  """
  try:
    data = json.loads(path.read_text(encoding='utf-8'))
    version = data['version']
    variants = {name: _decode(variant) for name, variant in data.pop('variants').items()}
    results = Results(**data, variants=variants)
  except OSError as error:
    raise ConfigError(f'{path}: {error.strerror}') from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ConfigError(f'{path}: no results: {type(error).__name__}: {error}') from error
  # A patch release keeps results; the first two numbers say that figures may have changed.
  if version.split('.')[:2] != deepseek_jax.__version__.split('.')[:2]:
    raise ConfigError(
      f'{path}: results of deepseek_jax {version}, this is {deepseek_jax.__version__}; '
      'figures of two versions do not compare: run the sweep again'
    )
  return results


def _decode(data: dict[str, Any]) -> VariantResult:
  runs = {int(seed): Run(**run) for seed, run in data.pop('runs').items()}
  data['changes'] = tuple(data['changes'])
  return VariantResult(**data, runs=runs)
