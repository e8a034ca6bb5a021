"""Every schedule on one model: what a step takes, waits and remembers, and which to take."""

import dataclasses
from collections.abc import Sequence

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.describe import bytes_text, duration, si, table
from deepseek_jax.pods.schedule.balance import Cut, cut_evenly, cut_folded, cut_for_devices
from deepseek_jax.pods.schedule.check import check_timeline
from deepseek_jax.pods.schedule.dual import DualPipe
from deepseek_jax.pods.schedule.greedy import Searched
from deepseek_jax.pods.schedule.kinds import (
  Asynchronous,
  GPipe,
  Interleaved,
  OneFOneB,
  ZeroBubbleH1,
  ZeroBubbleH2,
  ZeroBubbleV,
)
from deepseek_jax.pods.schedule.plan import Cost, add_costs
from deepseek_jax.pods.schedule.simulate import Timeline, simulate

PipelineSchedule = (
  GPipe
  | OneFOneB
  | Asynchronous
  | Interleaved
  | ZeroBubbleH1
  | ZeroBubbleH2
  | ZeroBubbleV
  | Searched
  | DualPipe
)

EVERY: tuple[PipelineSchedule, ...] = (
  GPipe(),
  OneFOneB(),
  Interleaved(),
  Interleaved(chunks_per_stage=4),
  ZeroBubbleH1(),
  ZeroBubbleH2(),
  ZeroBubbleV(),
  Searched(),
  Searched(memory=2.0),
  DualPipe(),
  Asynchronous(),
)


FOLDED = (ZeroBubbleV, Searched, DualPipe)
"""Kinds under which a device has a chunk from the front of the model and one from its back."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """Names a schedule.

  Attributes:
    schedule: the kind.
  """

  schedule: PipelineSchedule = OneFOneB()


AS_FAST = 1.01
"""Schedules within this factor of the fastest count as equally fast."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """What a schedule comes to for a model.

  Attributes:
    schedule: the kind.
    cut: which units are in which chunk.
    timeline: what happens when.
    microbatches: of one step.
  """

  schedule: PipelineSchedule
  cut: Cut
  timeline: Timeline
  microbatches: int

  @property
  def name(self) -> str:
    """How the schedule is written."""
    return repr(self.schedule)

  @property
  def step(self) -> float:
    """Time of one step."""
    return self.timeline.makespan * self.microbatches / self.timeline.plan.microbatches

  @property
  def synchronous(self) -> bool:
    """Whether every pass of a step meets the weights that the step began with."""
    return not isinstance(self.schedule, Asynchronous)

  @property
  def device_bytes(self) -> tuple[float, ...]:
    """Weights and the most activations of each device; no optimizer, no gradients."""
    timeline = self.timeline
    pairs = zip(timeline.parameter_bytes(), timeline.peak_bytes(), strict=True)
    return tuple(weights + activations for weights, activations in pairs)

  @property
  def work(self) -> tuple[float, ...]:
    """Compute time of each device for a microbatch of each way through it."""
    plan, costs = self.timeline.plan, self.timeline.costs
    held = (plan.held(device) for device in range(plan.stages))
    return tuple(sum(costs[chunk].total for chunk in mine) for mine in held)

  @property
  def stage_spread(self) -> float:
    """Largest less smallest work of a device, as a share of the mean."""
    work = self.work
    return (max(work) - min(work)) * len(work) / sum(work)


def try_schedule(
  schedule: PipelineSchedule,
  units: Sequence[Cost],
  stages: int,
  microbatches: int,
  transfer: float = 0.0,
) -> Outcome:
  """Cuts a model for a schedule, simulates it, and checks what the simulator says.

  The cut has the cheapest dearest chunk; where a device has several chunks, one with a cheap
  dearest device is tried too, and what takes less time is taken.

  Args:
    schedule: the kind.
    units: costs of the model's units, first to last.
    stages: devices.
    microbatches: of a step.
    transfer: time from the end of work on one device until another has its result.

  Raises:
    ConfigError: the numbers do not fit the kind, or there are fewer units than chunks.
  """
  faults = schedule.faults(stages, microbatches)
  if faults:
    raise ConfigError(f'{type(schedule).__name__}: {fault}' for fault in faults)
  totals, chunks = [unit.total for unit in units], schedule.chunks(stages)
  cuts = [cut_evenly(totals, chunks)]
  if isinstance(schedule, FOLDED):
    cuts.append(cut_folded(totals, chunks))
  elif chunks > stages:
    cuts.append(cut_for_devices(totals, [chunk % stages for chunk in range(chunks)]))
  found = []
  for cut in cuts:
    costs = tuple(add_costs(tuple(units[start:end])) for start, end in cut.bounds)
    timeline = simulate(schedule.plan(stages, microbatches, costs), costs, transfer)
    found.append((timeline, cut))
  timeline, cut = min(found, key=lambda pair: pair[0].makespan)
  check_timeline(timeline)
  return Outcome(schedule=schedule, cut=cut, timeline=timeline, microbatches=microbatches)


def outcome_table(outcomes: Sequence[Outcome], unit: str) -> str:
  """Returns a table in text, a line a schedule.

  Args:
    outcomes: of the same model and devices.
    unit: of times: 'seconds' or 'FLOPs'.
  """
  show = duration if unit == 'seconds' else si
  rows = []
  for outcome in outcomes:
    timeline = outcome.timeline
    rows.append(
      (
        outcome.name,
        show(outcome.step),
        f'{timeline.bubble:.1%}',
        f'{min(timeline.bubbles):.1%}–{max(timeline.bubbles):.1%}',
        f'{timeline.span_bubble:.1%}',
        f'{timeline.compute_share:.1%}',
        f'{outcome.stage_spread:.1%}',
        f'{max(timeline.peak_microbatches()):.4g}',
        bytes_text(max(timeline.peak_bytes())),
        bytes_text(max(timeline.parameter_bytes())),
      )
    )
  heads = (
    'schedule',
    'step' if unit == 'seconds' else 'step, FLOPs',
    'bubble',
    'by stage',
    'no barrier',
    'computing',
    'spread',
    'microbatches',
    'activations',
    'weights',
  )
  return table(rows, heads)


def describe_stages(outcome: Outcome, names: Sequence[str]) -> str:
  """Returns a line for each device: its units, and its share of waiting and memory.

  Args:
    outcome: of one schedule.
    names: of the model's units.
  """
  timeline, rows = outcome.timeline, []
  mean = sum(outcome.work) / len(outcome.work)
  for device in range(timeline.plan.stages):
    held = dict.fromkeys(timeline.plan.held(device))
    parts = []
    for chunk in held:
      start, end = outcome.cut.bounds[chunk]
      parts.append(names[start] if end == start + 1 else f'{names[start]} … {names[end - 1]}')
    rows.append(
      (
        device,
        ' + '.join(parts),
        f'{outcome.work[device] / mean:.3f}',
        f'{timeline.bubbles[device]:.1%}',
        f'{timeline.peak_microbatches()[device]:.4g}',
        bytes_text(timeline.peak_bytes()[device]),
      )
    )
  heads = ('device', 'units', 'work / mean', 'bubble', 'microbatches', 'activations')
  return table(rows, heads)


def recommend(outcomes: Sequence[Outcome], memory_bytes: float | None = None) -> tuple[str, str]:
  """Returns the name of the schedule to take, and why.

  Of those as fast as the fastest (within 1 %) it is the one whose fullest device holds least, in
  weights and activations. Schedules that work on old weights are left out, since what they train
  is another thing.

  Args:
    outcomes: of the same model and devices.
    memory_bytes: what a device has for weights and activations, or None for no limit.

  Raises:
    ConfigError: no synchronous schedule fits into the memory.
  """
  fit = [
    one
    for one in outcomes
    if one.synchronous and (memory_bytes is None or max(one.device_bytes) <= memory_bytes)
  ]
  if not fit:
    limit = '' if memory_bytes is None else f' fits into {bytes_text(memory_bytes)} a device'
    raise ConfigError(f'no synchronous schedule{limit or " was tried"}')
  fastest = min(one.step for one in fit)
  near = [one for one in fit if one.step <= AS_FAST * fastest]
  best = min(near, key=lambda one: max(one.device_bytes))
  slowest = max(fit, key=lambda one: one.step)
  reason = (
    f'{best.timeline.bubble:.1%} bubble, {slowest.step / best.step:.2f} times as fast as '
    f'{slowest.name}; {bytes_text(max(best.device_bytes))} of weights and activations on the '
    f'fullest device'
  )
  others = [one.name for one in near if one is not best]
  if others:
    reason += f'; as fast, with more of them: {", ".join(others)}'
  return best.name, reason


def draw_text(timeline: Timeline, columns: int = 100) -> str:
  """Returns a timeline in text: a line a device, time from left to right.

  A digit is a forward pass of the microbatch with that last digit, a letter (a for 0, …) its whole
  backward pass or the gradient of what came in, `-` gradients of weights, `#` a pair that
  overlaps, a dot waiting. Work shorter than a column may not be seen.

  Args:
    timeline: what happens when.
    columns: characters of the longest line.
  """
  scale = columns / timeline.makespan
  lines = []
  for device, mine in enumerate(timeline.by_device()):
    line = ['.'] * columns
    for event in mine:
      kind, _, microbatch = event.slot[0]
      letter = chr(ord('a') + microbatch % 10)
      sign = {'F': str(microbatch % 10), 'W': '-'}.get(kind, letter)
      sign = '#' if len(event.slot) > 1 else sign
      start, end = round(event.start * scale), round(event.end * scale)
      line[start:end] = [sign] * (end - start)
    lines.append(f'{device:>3} {"".join(line)}')
  return '\n'.join(lines)
