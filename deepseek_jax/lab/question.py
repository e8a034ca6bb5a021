"""A question as a file: `experiments/<question>/sweep.py`, read and checked.

The file has two functions and may have two names:

  def base() -> Experiment: …       what every variant begins as
  def variants() -> Sweep: …        what is tried, seeds included: product(…, seeds(3))
  match = FlopsPerToken()           at what equal cost variants compare (deepseek_jax/lab/match.py)
  baseline = 'base'                 what others are compared with; the first if absent. A variant's
                                    name, or the last part of several (deepseek_jax/lab/groups.py)
"""

import dataclasses
import pathlib
from typing import Any

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.load import call_function, load_module
from deepseek_jax.core.sweep import Sweep, Variant, resolve, split_seeds
from deepseek_jax.lab.groups import pair_up
from deepseek_jax.lab.match import Match
from deepseek_jax.train.experiment import Experiment

RESERVED = ('compiled', 'logs')
"""Folders of a sweep that are no variant's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """What a sweep's file says, with every variant's config resolved.

  Attributes:
    name: of the question: the file's folder, or the file where it is not called `sweep.py`.
    variants: in order.
    seeds: of each variant.
    match: at what equal cost variants compare, or None to leave their steps alone.
    baseline: what others are compared with; see `groups`.
  """

  name: str
  variants: tuple[Variant[Experiment], ...]
  seeds: tuple[int, ...]
  match: Match | None
  baseline: str


def read_question(
  file: pathlib.Path, root: pathlib.Path, seeds: int | None = None, steps: int | None = None
) -> Question:
  """Runs a sweep's file and resolves its variants.

  Args:
    file: the file.
    root: a file below this folder is known by its dotted name, so that kinds that it defines can
      be found again in a saved config.
    seeds: how many seeds to run instead of those that the file asks for.
    steps: `train_steps` of the base instead of its own.

  Raises:
    ConfigError: with all that is wrong with the file, and with all variants.
  """
  module = load_module(file, _dotted(file, root))
  base = call_function(module, 'base', file)
  if not isinstance(base, Experiment):
    raise ConfigError(f'`base` in {file} returns {type(base).__name__}; expected an Experiment')
  sweep = call_function(module, 'variants', file)
  if not isinstance(sweep, Sweep):
    raise ConfigError(
      f'`variants` in {file} returns {type(sweep).__name__}; expected a Sweep, made by product(…), '
      'zipped(…) or chain(…) of deepseek_jax.core.sweep'
    )
  points, own = split_seeds(sweep)
  if steps is not None:
    base = dataclasses.replace(base, train_steps=steps)
    if any('train_steps' in point for point in points):
      raise ConfigError('--steps, and variants that set `train_steps`: leave one of the two out')
  variants = resolve(base, points)
  return Question(
    name=file.resolve().parent.name if file.stem == 'sweep' else file.stem,
    variants=variants,
    seeds=tuple(range(seeds)) if seeds is not None else own or (0,),
    match=_match(module, file),
    baseline=_baseline(module, file, [variant.name for variant in variants]),
  )


def _dotted(file: pathlib.Path, root: pathlib.Path) -> str | None:
  path = file.resolve().with_suffix('')
  if not path.is_relative_to(root):
    return None
  parts = path.relative_to(root).parts
  return '.'.join(parts) if all(part.isidentifier() for part in parts) else None


def _match(module: Any, file: pathlib.Path) -> Match | None:
  match = getattr(module, 'match', None)
  wrong = isinstance(match, type) or not all(
    hasattr(match, name) for name in ('unit', 'measure', 'steps')
  )
  if match is not None and wrong:
    raise ConfigError(
      f'`match` in {file} is {match!r}; expected one of [ActiveParameters(), FlopsPerToken(), '
      'WallClock(), None]'
    )
  return match


def _baseline(module: Any, file: pathlib.Path, names: list[str]) -> str:
  errors = [f'a variant cannot be called {name}' for name in names if name.casefold() in RESERVED]
  baseline = str(getattr(module, 'baseline', names[0]))
  try:
    pair_up(baseline, names)
  except ConfigError as error:
    errors += [f'{file}: {message}' for message in error.messages]
  if errors:
    raise ConfigError(errors)
  return baseline
