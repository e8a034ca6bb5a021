"""Looks for a layout of a run on a pod: many estimated roughly, the best few compiled."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.describe import table
from deepseek_jax.core.override import override
from deepseek_jax.core.precision import BFloat16
from deepseek_jax.core.serialise import digest, to_module
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.layers.moe.dispatch.local import Local
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.remat import Compressed, EveryLayer, Save, SquareRoot
from deepseek_jax.pods.analytic import Rough, estimate_roughly, rough_machine
from deepseek_jax.pods.plan import Plan, from_json, to_json
from deepseek_jax.pods.topology import Topology
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import EXPERT, FSDP, TENSOR
from deepseek_jax.sharding.rules import Rules
from deepseek_jax.train.experiment import Experiment, resolved

GIB = 2**30

EXPERT_TENSOR = dataclasses.replace(
  TENSOR, batch=EXPERT.batch, act_expert=EXPERT.act_expert, expert=EXPERT.expert
)
"""Whole experts over `expert`; heads and hidden units over `model`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
  """What is tried.

  Attributes:
    expert: sizes of the mesh axis `expert`.
    model: sizes of the mesh axis `model`.
    microbatches: numbers of microbatches.
    remat: kinds, None among them.
    moments: formats of the optimizer's moments.
    bound: room of an expert's device over its even share, where tokens travel.
  """

  expert: tuple[int, ...] = (1, 4, 8, 16, 32, 64)
  model: tuple[int, ...] = (1, 2, 4)
  microbatches: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16)
  remat: tuple[Any, ...] = (None, EveryLayer(), Save(), SquareRoot(), Compressed())
  moments: tuple[str, ...] = ('bfloat16', 'float32')
  bound: float | None = 2.0


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A layout of a run.

  Attributes:
    topology: the slice.
    experiment: the whole run.
    rough: its rough plan.
  """

  topology: Topology
  experiment: Experiment
  rough: Rough

  @property
  def margin(self) -> float:
    """Bytes to spare, roughly."""
    return self.topology.chip.hbm_bytes - self.rough.total_bytes

  @property
  def name(self) -> str:
    """Of the files that are kept of it."""
    return f'{self.topology.name.replace(":", "_")}-{digest(self.experiment)[:12]}'


@dataclasses.dataclass(frozen=True)
class Found:
  """A layout that was compiled."""

  candidate: Candidate
  plan: Plan


def layouts(experiment: Experiment, topology: Topology, space: Space) -> Iterator[Experiment]:
  """Yields every layout of a run that fits together on a slice; its batch stays as it is."""
  experiment = resolved(experiment, BFloat16())
  devices = topology.devices
  combinations = itertools.product(
    space.expert, space.model, space.microbatches, space.remat, space.moments
  )
  for expert, model, microbatches, remat, moments in combinations:
    if devices % (expert * model) or experiment.data.batch_size % microbatches:
      continue
    mesh = MeshConfig(data=devices // (expert * model), expert=expert, model=model)
    changes: dict[str, Any] = {
      'mesh': mesh,
      'rules': _rules(expert, model),
      'microbatches': microbatches,
      'remat': remat,
      'optimizer.moments': moments,
    }
    changes |= _dispatch(experiment, expert, space.bound)
    found = override(experiment, changes)[0]
    # Reading a large vocabulary each time would take longer than everything else.
    data: Any = found.data
    small = dataclasses.replace(data, tokenizer=Bytes())
    if not dataclasses.replace(found, data=small).check(devices):
      yield found


def _rules(expert: int, model: int) -> Rules:
  if expert > 1:
    return EXPERT if model == 1 else EXPERT_TENSOR
  return FSDP if model == 1 else TENSOR


def _dispatch(experiment: Experiment, expert: int, bound: float | None) -> dict[str, Any]:
  """What tokens do on a mesh with so many devices along `expert`, for every mixture of experts."""
  model: Any = experiment.model
  kinds = [name for name in ('feed_forward', 'hashed') if hasattr(model, name)]
  chosen = Local() if expert == 1 else AllToAll(bound=bound)
  return {
    f'model.{name}.dispatch': chosen for name in kinds if isinstance(getattr(model, name), MoE)
  }


def rank(experiment: Experiment, topology: Topology, space: Space) -> list[Candidate]:
  """Returns the layouts that fit, by the rough estimate, fastest first.

  Raises:
    ConfigError: none fits; says which came nearest.
  """
  fitting, nearest = [], None
  for layout in layouts(experiment, topology, space):
    try:
      rough = estimate_roughly(layout, rough_machine(layout, topology))
    except ConfigError:
      # Arrays that do not divide among the devices of this mesh.
      continue
    candidate = Candidate(topology, layout, rough)
    if candidate.margin >= 0:
      fitting.append(candidate)
    elif nearest is None or candidate.margin > nearest.margin:
      nearest = candidate
  if not fitting and nearest is not None:
    raise ConfigError(
      f'{topology.name}: no layout fits; nearest is {describe_layout(nearest.experiment)}, '
      f'{-nearest.margin / GIB:.1f} GiB over: try more chips, or rows of fewer tokens'
    )
  if not fitting:
    raise ConfigError(
      f'{topology.name}: no mesh divides {experiment.data.batch_size} rows and the weights'
    )
  return sorted(fitting, key=lambda c: (c.rough.step_seconds, -c.margin))


def choose(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
  """Returns the few that are compiled: the fastest, at most one of each mesh and remat."""
  seen: dict[tuple[MeshConfig, str], Candidate] = {}
  for candidate in candidates:
    key = candidate.experiment.mesh, type(candidate.experiment.remat).__name__
    seen.setdefault(key, candidate)
  return list(seen.values())[:count]


def compile_best(
  candidates: Sequence[Candidate],
  folder: pathlib.Path,
  compile_plan: Callable[[Candidate], Plan],
  say: Callable[[str], None] = print,
) -> list[Found]:
  """Compiles candidates, or takes what was kept of them; each is kept as soon as it is made.

  Args:
    candidates: from `choose`.
    folder: of the plans and configs; the same search goes on there after a kill.
    compile_plan: makes the plan of one.
    say: prints a line.
  """
  folder.mkdir(parents=True, exist_ok=True)
  found = []
  for candidate in candidates:
    kept = folder / f'{candidate.name}.json'
    if kept.exists():
      plan = from_json(kept.read_text(encoding='utf-8'))
      say(f'kept      {describe_layout(candidate.experiment)}')
    else:
      say(f'compiles  {describe_layout(candidate.experiment)}')
      plan = compile_plan(candidate)
      write_config(candidate.experiment, folder / f'{candidate.name}.py')
      partial = kept.with_suffix('.partial')
      partial.write_text(to_json(plan), encoding='utf-8')
      partial.rename(kept)
    found.append(Found(candidate, plan))
  return found


def write_config(experiment: Experiment, path: pathlib.Path) -> None:
  """Writes a config file that gives a run."""
  path.write_text(to_module(experiment), encoding='utf-8')


def pareto(found: Sequence[Found]) -> list[Found]:
  """Returns those that no other beats in chips, time of a step and memory to spare at once."""

  def figures(item: Found) -> tuple[float, float, float]:
    plan = item.plan
    return (
      item.candidate.topology.chips,
      plan.time.step_seconds,
      -plan.memory.spare_bytes,
    )

  kept = []
  for item in found:
    mine = figures(item)
    beaten = any(
      all(a <= b for a, b in zip(figures(other), mine)) and figures(other) != mine
      for other in found
      if other.plan.fits or not item.plan.fits
    )
    if item.plan.fits and not beaten:
      kept.append(item)
  return sorted(kept, key=figures)


def describe_layout(experiment: Experiment) -> str:
  """Returns mesh, rules, remat, microbatches and moments of a run in one line."""
  mesh, moments = experiment.mesh, getattr(experiment.optimizer, 'moments', '')
  axes = f'data {mesh.data} × expert {mesh.expert} × model {mesh.model}'
  remat = 'no remat' if experiment.remat is None else repr(experiment.remat)
  return f'{axes}, {remat}, {experiment.microbatches} microbatches, {moments} moments'


def describe_ranking(candidates: Sequence[Candidate], rows: int) -> str:
  """Returns the first rows of a rough ranking."""
  shown = [
    (
      describe_layout(c.experiment),
      f'{c.rough.step_seconds:.2f}',
      f'{c.margin / GIB:.1f}',
    )
    for c in candidates[:rows]
  ]
  return table(shown, (f'{len(candidates)} layouts that fit, roughly', 'seconds', 'GiB to spare'))


def describe_found(found: Sequence[Found]) -> str:
  """Returns what was compiled, those on the frontier marked."""
  best = {id(item) for item in pareto(found)}
  rows = [
    (
      '*' if id(item) in best else '',
      item.candidate.topology.chips,
      describe_layout(item.candidate.experiment),
      f'{item.plan.time.step_seconds:.2f}',
      f'{100 * item.plan.mfu:.1f} %',
      f'{item.plan.memory.spare_bytes / GIB:.1f}',
      f'{item.candidate.rough.step_seconds:.2f}',
      f'{item.candidate.margin / GIB:.1f}',
      f'{item.candidate.name}.py',
    )
    for item in found
  ]
  heads = ('*', 'chips', 'layout', 's a step', 'MFU', 'GiB to spare', 'roughly s', 'GiB', 'config')
  return table(rows, heads)
