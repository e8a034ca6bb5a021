"""At what equal cost the variants of a sweep compare, and the steps that make it so.

A kind answers two questions: what a run costs, and how many steps a variant gets so that its run
costs as much as the baseline's. The baseline keeps its steps.
"""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Mapping

import jax
import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.describe import duration, si, table
from deepseek_jax.models.cost import active_parameters
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.step import Program
from deepseek_jax.train.summary import experiment_weights, step_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matched:
  """What was adjusted in a variant.

  Attributes:
    cost: of the variant, in the kind's unit.
    asked_steps: steps its config asked for.
    steps: steps it gets.
  """

  cost: float
  asked_steps: int
  steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActiveParameters:
  """Every token meets as many parameters in each variant; steps stay as they are.

  With the same steps and the same batch, the runs then differ in how parameters are arranged and
  not in how many a token is multiplied with. That is a property of the configs which no number of
  steps can mend, so it is required: a variant that is further away than the tolerance is refused.
  Attention's mixing and look-up tables are no parameters met; `FlopsPerToken` counts the former.

  Attributes:
    tolerance: largest share by which a variant may differ from the baseline. Routers grow with the
      number of experts, so that few sparsities match to the last parameter.
  """

  tolerance: float = 0.02

  unit = 'parameters met by a token'

  def __post_init__(self):
    if not 0 <= self.tolerance < 1:
      raise ConfigError(f'`tolerance` is {self.tolerance}; expected a share in [0, 1)')

  def measure(self, programs: Mapping[str, Program], cache_dir: pathlib.Path) -> dict[str, float]:
    """Counts, for each variant, the parameters that one token is multiplied with."""
    return {
      name: float(active_parameters(experiment_weights(program)))
      for name, program in programs.items()
    }

  def steps(self, experiment: Experiment, cost: float, reference: Matched) -> int:
    """Returns the steps of the config.

    Raises:
      ConfigError: the cost is too far from the reference's.
    """
    off = cost / reference.cost - 1
    if abs(off) > self.tolerance:
      raise ConfigError(
        f'a token meets {si(round(cost))} parameters, {off:+.1%} against the '
        f'{si(round(reference.cost))} of the baseline; match = ActiveParameters(tolerance='
        f'{self.tolerance}) wants them equal'
      )
    return experiment.train_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlopsPerToken:
  """The whole run of each variant takes as many training FLOPs: a dearer token means fewer of them.

  FLOPs are those of `models/cost.py`: three times the forward pass, attention's mixing included,
  nothing for recomputation or for moving data. Batch size and length are taken into account, and so
  are experts' matrices that are made from factors in every pass, and choices that are not active
  at first (at the steps that the config asks for).
  """

  unit = 'training FLOPs a step'

  def measure(self, programs: Mapping[str, Program], cache_dir: pathlib.Path) -> dict[str, float]:
    """Counts, for each variant, the FLOPs of a step."""
    return {
      name: float(np.mean(step_flops(program.experiment, experiment_weights(program))))
      for name, program in programs.items()
    }

  def steps(self, experiment: Experiment, cost: float, reference: Matched) -> int:
    """Returns as many steps as the reference's run pays for."""
    return _paid_steps(cost, reference)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WallClock:
  """The training steps of each variant take as many seconds, on this machine as it is now.

  A few steps of each variant are timed on its own text, and the median counts; compilation,
  evaluation and checkpoints are left out. Timing is noisy where the machine has other work, and
  runs side by side slow each other down alike only if they are alike: the figures are kept in
  `sweep.json`, so that a sweep that goes on keeps its steps.

  Attributes:
    timed_steps: steps that are timed.
    warmup_steps: steps before them that are not.
  """

  timed_steps: int = 12
  warmup_steps: int = 3

  unit = 'seconds a step'

  def __post_init__(self):
    errors = [
      f'`{name}` is {getattr(self, name)}; expected {least} or more'
      for name, least in (('timed_steps', 1), ('warmup_steps', 0))
      if getattr(self, name) < least
    ]
    if errors:
      raise ConfigError(errors)

  def measure(self, programs: Mapping[str, Program], cache_dir: pathlib.Path) -> dict[str, float]:
    """Times, for each variant, some training steps.

    Args:
      programs: of the variants.
      cache_dir: folder for tokens and pack plans.
    """
    return {name: self._time(program, cache_dir) for name, program in programs.items()}

  def steps(self, experiment: Experiment, cost: float, reference: Matched) -> int:
    """Returns as many steps as the reference's run has seconds for."""
    return _paid_steps(cost, reference)

  def _time(self, program: Program, cache_dir: pathlib.Path) -> float:
    batches = program.experiment.data.prepare(cache_dir).train_batches(0)
    state = program.init(jax.random.key(program.experiment.seed))
    spent = []
    for number in range(self.warmup_steps + self.timed_steps):
      batch = jax.device_put(next(batches), program.batch_sharding)
      begin = time.perf_counter()
      state, metrics = program.step(state, batch)
      jax.block_until_ready(metrics['loss'])
      if number >= self.warmup_steps:
        spent.append(time.perf_counter() - begin)
    return statistics.median(spent)


type Match = ActiveParameters | FlopsPerToken | WallClock
"""The kinds; any object with `unit`, `measure` and `steps` will do."""


def match_steps(
  match: Match,
  programs: Mapping[str, Program],
  baselines: Mapping[str, str],
  cache_dir: pathlib.Path,
) -> dict[str, Matched]:
  """Says how many steps each variant gets.

  Args:
    match: the rule.
    programs: variant → its functions, from `build_program`.
    baselines: variant → the variant whose run it costs as much as.
    cache_dir: folder for tokens and pack plans.

  Returns:
    Variant → what was adjusted, in the order given.

  Raises:
    ConfigError: with every variant that cannot be matched.
  """
  experiments = {name: program.experiment for name, program in programs.items()}
  for group in dict.fromkeys(baselines[name] for name in experiments):
    own = {e.train_steps for name, e in experiments.items() if baselines[name] == group}
    if len(own) > 1 and not isinstance(match, ActiveParameters):
      raise ConfigError(
        f'variants ask for {", ".join(map(str, sorted(own)))} train_steps, and match = '
        f'{type(match).__name__}() sets them; leave one of the two out'
      )
  costs = match.measure(programs, cache_dir)
  errors, result = [], {}
  for name, experiment in experiments.items():
    asked = experiments[baselines[name]].train_steps
    reference = Matched(cost=costs[baselines[name]], asked_steps=asked, steps=asked)
    try:
      steps = match.steps(experiment, costs[name], reference)
      result[name] = Matched(cost=costs[name], asked_steps=experiment.train_steps, steps=steps)
    except ConfigError as error:
      errors += [f'{name}: {message}' for message in error.messages]
  if errors:
    raise ConfigError(errors)
  return result


def describe_match(
  match: Match, matched: Mapping[str, Matched], baselines: Mapping[str, str]
) -> str:
  """Returns a table of what was adjusted.

  Args:
    match: the rule.
    matched: variant → what was adjusted.
    baselines: variant → the variant it was matched to.
  """
  rows = [
    (
      name,
      duration(row.cost) if isinstance(match, WallClock) else si(row.cost),
      f'{row.cost / matched[baselines[name]].cost:.3f}',
      row.asked_steps,
      row.steps,
      f'{row.steps / row.asked_steps - 1:+.1%}' if row.steps != row.asked_steps else 'as asked',
    )
    for name, row in matched.items()
  ]
  against = ' or '.join(dict.fromkeys(baselines[name] for name in matched))
  headers = ('variant', match.unit, f'against {against}', 'steps asked for', 'steps', 'adjusted')
  return f'matched by {type(match).__name__}\n{table(rows, headers)}'


def _paid_steps(cost: float, reference: Matched) -> int:
  steps = round(reference.asked_steps * reference.cost / cost)
  if steps < 1:
    raise ConfigError(
      f'a step costs {cost / reference.cost:.3g} times one of the baseline, whose whole run has '
      f'{reference.asked_steps}'
    )
  return steps
