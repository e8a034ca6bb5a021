"""From a config to trained models and curves, in memory: no flags, no mesh, no workdir."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from deepseek_jax.core import override as grammar
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.describe import duration, si, table
from deepseek_jax.core.precision import Float32
from deepseek_jax.data.batch import Batch
from deepseek_jax.data.packed_split import heldout_batches
from deepseek_jax.data.pipeline import train_batches
from deepseek_jax.hub import CACHE_DIR, Pretrained
from deepseek_jax.lab.statistics import CONFIDENCE, paired_difference, summarise
from deepseek_jax.models.cost import active_parameters
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.train.evaluate import evaluate
from deepseek_jax.train.experiment import Experiment, resolved
from deepseek_jax.train.report import layer_loads
from deepseek_jax.train.step import Program, build_program
from deepseek_jax.train.summary import experiment_weights


def override(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
  """Returns the experiment with parts changed; prints what is different, and the size it makes.

  Args:
    experiment: a run; it stays as it is.
    changes: dotted path → value, such as `{'model.attention': 'Window(size=64)'}`. Any object that
      obeys the interface of a part may stand in its place, also one that was written a moment ago.

  Raises:
    ConfigError: with all that is wrong with all changes, or between the parts.
  """
  new, differences = grammar.override(experiment, changes)
  sizes = [_sizes(one_device(config)) for config in (experiment, new)]
  for difference in differences:
    print(difference)
  for name, before, after in zip(('parameters', 'of them met by a token'), *sizes):
    print(f'{name}: {si(before)} → {si(after)}' + ('' if before == after else ' (changed)'))
  return new


def one_device(experiment: Experiment) -> Program:
  """Builds the functions of a run for one device; `Fastest` becomes float32.

  So that what a notebook shows does not depend on how many devices it has, or on a measurement.
  The last few programs are kept: a cell that is run again compiles nothing.

  Raises:
    ConfigError: the parts do not fit together; every fault is listed.
  """
  experiment = dataclasses.replace(resolved(experiment, Float32()), mesh=MeshConfig())
  return _program(experiment, jax.devices()[0])


@functools.lru_cache(maxsize=8)
def _program(experiment: Experiment, device: jax.Device) -> Program:
  return build_program(experiment, [device])


def _sizes(program: Program) -> tuple[int, int]:
  weights = experiment_weights(program)
  return sum(weight.size for weight in weights), active_parameters(weights)


def init(experiment: Experiment, seed: int | None = None) -> Pretrained:
  """Returns an untrained model.

  Args:
    experiment: the run whose model it is.
    seed: of the weights; None takes the run's own.

  Raises:
    ConfigError: the parts do not fit together; every fault is listed.
  """
  program = one_device(experiment)
  state = program.init(jax.random.key(experiment.seed if seed is None else seed))
  return Pretrained(
    experiment=program.experiment, variables={'params': state.params, 'buffers': state.buffers}
  )


def heldout(experiment: Experiment, cache_dir: str | pathlib.Path = CACHE_DIR) -> Batch:
  """Returns the first batch of held-out text, [B, T] NumPy arrays.

  Args:
    experiment: the run whose data it is.
    cache_dir: folder for tokens and pack plans; made if needed.
  """
  data = experiment.data.prepare(pathlib.Path(cache_dir).expanduser())
  return next(heldout_batches(data.heldout, experiment.data.batch_size))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
  """What some steps of one config gave, once for each seed.

  Attributes:
    experiment: the run as it was trained; its `train_steps` are the steps of the trial.
    seeds: one a run.
    curves: name → [seeds, steps] float64: `loss` (nats a token of the batch before its update),
      `grad_norm`, `learning_rate`, and `mtp_loss` where the model looks ahead.
    loads: layer (`layers/3`) → [seeds, steps, E] tokens that chose each expert.
    heldout: [seeds] bits per byte of held-out text after the last step.
    step_seconds: median time of a step, compilation left out.
    models: the trained models.
  """

  experiment: Experiment
  seeds: tuple[int, ...]
  curves: dict[str, np.ndarray]
  loads: dict[str, np.ndarray]
  heldout: np.ndarray
  step_seconds: float
  models: tuple[Pretrained, ...]

  @property
  def model(self) -> Pretrained:
    """The trained model of the first seed."""
    return self.models[0]


def train(
  experiment: Experiment,
  steps: int = 50,
  seeds: int | Sequence[int] = 1,
  heldout_batches: int = 8,
  cache_dir: str | pathlib.Path = CACHE_DIR,
) -> Trial:
  """Trains for some steps, from fresh weights, on one device; nothing is written but the cache.

  The schedule spans the steps: a trial of 50 steps is a whole run of 50 steps, not the beginning
  of a longer one. Seeds differ in weights and in the order of the text; equal seeds of two
  variants read the same text in the same order. `Fastest` trains in float32.

  Args:
    experiment: the run.
    steps: how many.
    seeds: which; a number n stands for 0 … n - 1. They share one compiled step.
    heldout_batches: batches of held-out text to measure on, spread evenly over all of it.
    cache_dir: folder for tokens and pack plans; made if needed.

  Raises:
    ConfigError: with all that is wrong with the arguments or between the parts.
  """
  chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
  faults = [] if chosen else [f'seeds: found {seeds!r}, expected at least 1']
  for name, count in (('steps', steps), ('heldout_batches', heldout_batches)):
    if count < 1:
      faults.append(f'{name}: found {count}, expected at least 1')
  if faults:
    raise ConfigError(faults)
  program = one_device(dataclasses.replace(experiment, train_steps=steps))
  experiment = program.experiment
  data = experiment.data.prepare(pathlib.Path(cache_dir).expanduser())
  runs = [_run(program, data, seed, heldout_batches) for seed in chosen]
  # What the guard, the routers and the biases report are trees of their own.
  scalars = [name for name, value in runs[0].rows[0].items() if not isinstance(value, dict)]
  segments = experiment.segments
  loads = [[layer_loads(row['observed'], segments) for row in run.rows] for run in runs]
  return Trial(
    experiment=experiment,
    seeds=chosen,
    curves={
      name: np.array([[row[name] for row in run.rows] for run in runs], np.float64)
      for name in scalars
    },
    loads={
      layer: np.array([[row[layer] for row in rows] for rows in loads]) for layer in loads[0][0]
    },
    heldout=np.array([run.bits for run in runs]),
    step_seconds=float(np.median(np.concatenate([run.seconds for run in runs]))),
    models=tuple(run.model for run in runs),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
  """One seed: metrics by step, seconds of all steps but the first, held-out bits per byte."""

  rows: list[dict[str, Any]]
  seconds: list[float]
  bits: float
  model: Pretrained


def _run(program: Program, data: Any, seed: int, batches: int) -> _Run:
  experiment = program.experiment
  start = time.perf_counter()
  state = program.init(jax.random.key(experiment.seed + seed))
  order = experiment.data.shuffle_seed + seed
  source = train_batches(data.train, 0, batch_size=experiment.data.batch_size, seed=order)
  rows, seconds = [], []
  for number in range(experiment.train_steps):
    begin = time.perf_counter()
    state, metrics = program.step(state, jax.device_put(next(source), program.batch_sharding))
    rows.append(jax.device_get(metrics))
    # The first step compiles; where it is the only one, it is better than nothing.
    if number or experiment.train_steps == 1:
      seconds.append(time.perf_counter() - begin)
  measured = evaluate(program, state.params, state.buffers, data.heldout, batches)
  print(
    f'seed {seed}: {len(rows)} steps, loss {rows[0]["loss"]:.3f} → {rows[-1]["loss"]:.3f}, '
    f'held-out {measured.bits_per_byte:.3f} bits/byte, {duration(time.perf_counter() - start)}'
  )
  model = Pretrained(
    experiment=experiment,
    variables={'params': state.params, 'buffers': state.buffers},
    step=len(rows),
  )
  return _Run(rows=rows, seconds=seconds, bits=measured.bits_per_byte, model=model)


def standard_error(values: np.ndarray) -> np.ndarray:
  """Returns the standard error of the mean over the first axis; NaN where there is one value."""
  count = len(values)
  if count < 2:
    return np.full(values.shape[1:], np.nan)
  return np.std(values, axis=0, ddof=1) / np.sqrt(count)


def compare(trials: Mapping[str, Trial]) -> str:
  """Returns a table: held-out bits per byte of each trial, and its difference to the first.

  Means with their standard error over the seeds; differences by `paired_difference`, seed by seed
  over those that both have, with an interval and what can be said of the sign.

  Args:
    trials: name → trial; the first is the baseline.

  Raises:
    ConfigError: there is no trial, or one shares no seed with the first.
  """
  if not trials:
    raise ConfigError('compare: expected at least 1 trial, found none')
  base = next(iter(trials.values()))
  rows = []
  for name, trial in trials.items():
    mine, theirs = (
      dict(zip(one.seeds, map(float, one.heldout), strict=True)) for one in (trial, base)
    )
    difference = paired_difference(mine, theirs)
    if not difference.pairs:
      raise ConfigError(f'compare: {name!r} has seeds {trial.seeds}, the first {base.seeds}')
    gap = ('–', 'baseline') if trial is base else (difference.text, difference.verdict)
    size, met = _sizes(one_device(trial.experiment))
    summary, pace = summarise(list(mine.values())), duration(trial.step_seconds)
    rows.append((name, summary.seeds, summary.text, *gap, si(size), si(met), pace))
  headers = (
    'variant', 'seeds', 'bits/byte', f'less the first [{CONFIDENCE:.0%}]', 'verdict',
    'parameters', 'met', 'a step',
  )  # fmt: skip
  return table(rows, headers)
