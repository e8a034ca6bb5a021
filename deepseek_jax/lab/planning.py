"""From a question to a plan: precision, equal cost and every check, before anything runs."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from deepseek_jax.core.annotation import is_config
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.precision import BFloat16, Fastest, Float32, Precision
from deepseek_jax.core.serialise import digest, to_python
from deepseek_jax.core.sweep import list_faults, note_faults
from deepseek_jax.lab.groups import pair_up
from deepseek_jax.lab.match import Matched, WallClock, match_steps
from deepseek_jax.lab.question import Question
from deepseek_jax.lab.sweep_file import Plan, Planned
from deepseek_jax.train.experiment import Experiment, resolved
from deepseek_jax.train.step import Program, build_program
from deepseek_jax.train.throughput import fastest_precision


def make_plan(question: Question, cache_dir: pathlib.Path, kept: Plan | None = None) -> Plan:
  """Says what a sweep runs, after checking every variant: each is built, none is compiled.

  What was measured before is kept, so that a sweep that goes on is the sweep that began.

  Args:
    question: the sweep's file.
    cache_dir: folder for tokens and pack plans.
    kept: the plan that is in the sweep's folder, or None. Its variants are checked already.

  Raises:
    ConfigError: with all that is wrong with all variants.
  """
  precision = _precision(question, kept)
  experiments = {
    variant.name: resolved(variant.config, Float32() if precision is None else precision)
    for variant in question.variants
  }
  match = None if question.match is None else _spell(question.match)
  known: dict[str, Planned] = {}
  if kept is not None and (kept.match, kept.baseline) == (match, question.baseline):
    known = {variant.asked: variant for variant in kept.variants}
  asked = _digests(experiments)
  fresh = [name for name in experiments if asked[name] not in known]
  programs = _build({name: experiments[name] for name in fresh})
  matched: dict[str, Matched] = {}
  if question.match is not None:
    baselines = pair_up(question.baseline, experiments)
    needed = {baselines[name] for name in fresh} - set(programs)
    programs |= _build({name: experiments[name] for name in needed})
    found = match_steps(question.match, programs, baselines, cache_dir) if fresh else {}
    for name in experiments:
      earlier = known[asked[name]].matched if asked[name] in known else None
      matched[name] = earlier or found[name]
    experiments = {
      name: dataclasses.replace(experiment, train_steps=matched[name].steps)
      for name, experiment in experiments.items()
    }
    # Fewer steps may not hold the schedule; and what differed in its steps alone no longer does.
    _recheck({name: experiments[name] for name in fresh})
    _digests(experiments)
  return Plan(
    question=question.name,
    baseline=question.baseline,
    match=match,
    seeds=tuple(sorted({*question.seeds, *(kept.seeds if kept else ())})),
    precision=None if precision is None else type(precision).__name__,
    platform=jax.default_backend(),
    variants=tuple(
      Planned(
        name=variant.name,
        changes=tuple(map(str, variant.changes)),
        values={path: _spell(value) for path, value in variant.point.items()},
        asked=asked[variant.name],
        matched=matched.get(variant.name),
        experiment=experiments[variant.name],
      )
      for variant in question.variants
    ),
  )


def measures(question: Question) -> bool:
  """Whether planning times this machine, so that two plans of one question may differ."""
  fastest = any(isinstance(v.config.precision, Fastest) for v in question.variants)
  return fastest or isinstance(question.match, WallClock)


def _precision(question: Question, kept: Plan | None) -> Precision | None:
  """One precision for all runs that ask for the fastest: two would not compare."""
  if not any(isinstance(variant.config.precision, Fastest) for variant in question.variants):
    return None
  if kept is not None and kept.precision is not None:
    chosen = kept.precision.lower()
  else:
    chosen = fastest_precision()[0]
  return Float32() if chosen == 'float32' else BFloat16()


def _digests(experiments: Mapping[str, Experiment]) -> dict[str, str]:
  """The content of each config in a few letters; refuses two that are the same."""
  faults: dict[str, list[str]] = {}
  names: dict[str, str] = {}
  equal = []
  for name, experiment in experiments.items():
    try:
      content = digest(experiment)
    except ConfigError as error:
      note_faults(faults, name, error.messages)
      continue
    if content in names:
      equal.append(f'variants {names[content]} and {name} are the same config')
    names.setdefault(content, name)
  messages = list_faults(faults, len(experiments)) + equal
  if messages:
    raise ConfigError(messages)
  return {name: content for content, name in names.items()}


def _build(experiments: Mapping[str, Experiment]) -> dict[str, Program]:
  """Builds every variant abstractly; compiles nothing and makes no array."""
  faults: dict[str, list[str]] = {}
  programs = {}
  for name, experiment in experiments.items():
    try:
      programs[name] = build_program(experiment)
    except ConfigError as error:
      note_faults(faults, name, error.messages)
  if faults:
    raise ConfigError(list_faults(faults, len(experiments)))
  return programs


def _recheck(experiments: Mapping[str, Experiment]) -> None:
  faults: dict[str, list[str]] = {}
  for name, experiment in experiments.items():
    note_faults(faults, name, experiment.check(len(jax.devices())))
  if faults:
    raise ConfigError(list_faults(faults, len(experiments)))


def _spell(value: Any) -> str:
  return to_python(value) if is_config(value) else repr(value)
