"""Schedules with one way through the devices: GPipe, 1F1B, interleaved, zero-bubble."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from deepseek_jax.core.config import ConfigError
from deepseek_jax.pods.schedule.plan import BACKWARD, FORWARD, INPUT, WEIGHT, Cost, Op, Plan


class Schedule(Protocol):
  """What every kind of schedule offers."""

  def chunks(self, stages: int) -> int:
    """Returns how many chunks the model is cut into."""

  def faults(self, stages: int, microbatches: int) -> list[str]:
    """Returns why there is no such schedule for these numbers; nothing where there is one."""

  def plan(self, stages: int, microbatches: int, costs: Sequence[Cost]) -> Plan:
    """Returns the orders; `costs`, one a chunk, matter to kinds that look at them."""


def check_numbers(schedule: Schedule, stages: int, microbatches: int) -> None:
  """Refuses what a schedule is not made for.

  Raises:
    ConfigError: there is no such schedule for these numbers.
  """
  faults = [
    f'`{name}` is {value}; expected 1 or more'
    for name, value in (('stages', stages), ('microbatches', microbatches))
    if value < 1
  ]
  faults = faults or schedule.faults(stages, microbatches)
  if faults:
    raise ConfigError(f'{type(schedule).__name__}: {fault}' for fault in faults)


def one_way(chunks: Sequence[int], microbatches: int, orders: Sequence[Sequence[Op]]) -> Plan:
  """Returns the plan of one way, in which nothing overlaps.

  Args:
    chunks: the device of each.
    microbatches: how many there are.
    orders: work of each device.
  """
  return Plan(
    routes=(tuple(chunks),),
    route_of=(0,) * microbatches,
    orders=tuple(tuple((op,) for op in order) for order in orders),
  )


class OneChunk:
  """What the kinds share that cut the model into one chunk a stage and take any numbers."""

  def chunks(self, stages: int) -> int:
    """Returns one chunk a stage."""
    return stages

  def faults(self, stages: int, microbatches: int) -> list[str]:
    """Returns nothing: any numbers will do."""
    del stages, microbatches
    return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPipe(OneChunk):
  """All forward passes, then all backward passes, the last microbatch first.

  Idle for (p − 1) / (m + p − 1) of the time with p equal stages and m microbatches, and every stage
  remembers all m.

  Source: Huang et al., "GPipe", arXiv 1811.06965, section 2.3 and figure 2c.
  """

  def plan(self, stages: int, microbatches: int, costs: Sequence[Cost] = ()) -> Plan:
    """Returns the orders."""
    del costs
    check_numbers(self, stages, microbatches)
    orders = [
      [Op(FORWARD, stage, m) for m in range(microbatches)]
      + [Op(BACKWARD, stage, m) for m in reversed(range(microbatches))]
      for stage in range(stages)
    ]
    return one_way(range(stages), microbatches, orders)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneFOneB(OneChunk):
  """A backward pass after each forward pass, as soon as there is one to do: 1F1B with a flush.

  As idle as GPipe with equal stages, but stage s remembers min(m, p − s) microbatches.

  Source: Narayanan et al., arXiv 2104.04473, section 2.2.1 (there "PipeDream-Flush").
  """

  def plan(self, stages: int, microbatches: int, costs: Sequence[Cost] = ()) -> Plan:
    """Returns the orders."""
    del costs
    check_numbers(self, stages, microbatches)
    orders = []
    for stage in range(stages):
      forward = [Op(FORWARD, stage, m) for m in range(microbatches)]
      backward = [Op(BACKWARD, stage, m) for m in range(microbatches)]
      orders.append(alternate(forward, backward, stages - stage - 1))
    return one_way(range(stages), microbatches, orders)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asynchronous(OneChunk):
  """1F1B without a flush: the next step's microbatches follow at once, on weights that are older.

  Only the first microbatches of the first step and the last of the last find the pipeline empty:
  p equal stages are idle for (p − 1) / (steps · m + p − 1) of the time. The price is not in the
  plan: stage 0 makes up to p − 1 forward passes with weights that the updates have left behind, and
  keeps a second copy of them until their backward passes.

  Attributes:
    steps: that follow each other without a flush.

  Source: Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training" (PipeDream-2BW), arXiv
  2006.09503, section 3.1.
  """

  steps: int = 16

  def __post_init__(self):
    if self.steps < 1:
      raise ConfigError(f'`steps` is {self.steps}; expected 1 or more')

  def plan(self, stages: int, microbatches: int, costs: Sequence[Cost] = ()) -> Plan:
    """Returns the orders of all steps; microbatches are numbered through."""
    check_numbers(self, stages, microbatches)
    return OneFOneB().plan(stages, self.steps * microbatches, costs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interleaved:
  """1F1B in which every device has several chunks of the model, a round of all devices each.

  Idle for (p − 1) / (v·m + p − 1) of the time with v chunks on each of p equal devices. Remembers
  more than 1F1B, and hands on v times as much.

  Attributes:
    chunks_per_stage: v.

  Source: Narayanan et al., arXiv 2104.04473, section 2.2.2.
  """

  chunks_per_stage: int = 2

  def __post_init__(self):
    if self.chunks_per_stage < 1:
      raise ConfigError(f'`chunks_per_stage` is {self.chunks_per_stage}; expected 1 or more')

  def chunks(self, stages: int) -> int:
    """Returns as many chunks as all devices have together."""
    return stages * self.chunks_per_stage

  def faults(self, stages: int, microbatches: int) -> list[str]:
    """Microbatches go through a device's chunks in groups of as many as there are stages."""
    if microbatches % stages:
      return [f'`microbatches` is {microbatches}; expected a multiple of {stages} stages']
    return []

  def plan(self, stages: int, microbatches: int, costs: Sequence[Cost] = ()) -> Plan:
    """Returns the orders."""
    del costs
    check_numbers(self, stages, microbatches)
    rounds = range(self.chunks_per_stage)
    groups = [range(at, at + stages) for at in range(0, microbatches, stages)]
    orders = []
    for stage in range(stages):

      def all_of(kind, turns, stage=stage):
        return [
          Op(kind, turn * stages + stage, m) for group in groups for turn in turns for m in group
        ]

      ahead = 2 * (stages - stage - 1) + (self.chunks_per_stage - 1) * stages
      orders.append(alternate(all_of(FORWARD, rounds), all_of(BACKWARD, rounds[::-1]), ahead))
    return one_way([*range(stages)] * self.chunks_per_stage, microbatches, orders)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroBubbleH1(OneChunk):
  """1F1B that puts the gradients of weights off, and fills the waiting at the end with them.

  With F, B, W for the three kinds of work, p equal stages wait (p − 1)(F + B − W) instead of
  (p − 1)(F + B + W), and none remembers more than the p microbatches of 1F1B's first stage.

  Source: Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241, section 2.1.
  """

  def plan(self, stages: int, microbatches: int, costs: Sequence[Cost] = ()) -> Plan:
    """Returns the orders."""
    del costs
    check_numbers(self, stages, microbatches)
    orders = [
      _put_off(stage, microbatches, ahead=stages - stage - 1, late=stage) for stage in range(stages)
    ]
    return one_way(range(stages), microbatches, orders)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroBubbleH2(OneChunk):
  """As `ZeroBubbleH1`, with more forward passes before the first backward one.

  Within a device's own span, p equal stages wait (p − 1)(F + B − 2W): nothing, where the three
  kinds of work take equally long. They remember up to 2p − 1 microbatches. From an empty pipeline
  to an empty one they wait more: devices begin and end one after the other, so that only an
  optimizer that does not wait for all of them gains it.

  Source: Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241, sections 2.2 and 4.
  """

  def plan(self, stages: int, microbatches: int, costs: Sequence[Cost] = ()) -> Plan:
    """Returns the orders."""
    del costs
    check_numbers(self, stages, microbatches)
    orders = [
      _put_off(stage, microbatches, ahead=2 * (stages - stage - 1), late=2 * stage)
      for stage in range(stages)
    ]
    return one_way(range(stages), microbatches, orders)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroBubbleV:
  """Two chunks a device, down the devices and up again: the last result is where the first began.

  Where the three kinds of work take equally long, devices wait within their own spans for nothing,
  and remember no more than the p microbatches of 1F1B's first stage. With fewer than 2p − 1
  microbatches the orders are those for as many, without what is not there.

  Source: Qi et al., "Pipeline Parallelism with Controllable Memory" (there "V-ZB"), arXiv
  2405.15362, section 3.
  """

  def chunks(self, stages: int) -> int:
    """Returns two chunks a stage."""
    return 2 * stages

  def faults(self, stages: int, microbatches: int) -> list[str]:
    """Returns nothing: any numbers will do."""
    del stages, microbatches
    return []

  def plan(self, stages: int, microbatches: int, costs: Sequence[Cost] = ()) -> Plan:
    """Returns the orders."""
    del costs
    check_numbers(self, stages, microbatches)
    count = max(microbatches, 2 * stages - 1)
    orders = [
      [op for op in _down_and_up(stage, stages, count) if op.microbatch < microbatches]
      for stage in range(stages)
    ]
    down = list(range(stages))
    return one_way(down + down[::-1], microbatches, orders)


def _down_and_up(stage: int, stages: int, microbatches: int) -> list[Op]:
  """Work of one stage, with a chunk on the way down and one on the way up."""
  counts: dict[tuple[str, int], int] = {}
  down, up, inner = stage, 2 * stages - 1 - stage, stages - stage

  def do(*work: tuple[str, int]) -> list[Op]:
    done = []
    for kind, chunk in work:
      m = counts[kind, chunk] = counts.get((kind, chunk), -1) + 1
      done.append(Op(kind, chunk, m))
    return done

  def left(kind: str, chunk: int) -> int:
    return microbatches - 1 - counts.get((kind, chunk), -1)

  order = do(*[(FORWARD, down)] * (2 * inner - 1))
  for _ in range(stage):
    order += do((FORWARD, up), (FORWARD, down))
  for _ in range(inner):
    order += do((FORWARD, up), (INPUT, up), (WEIGHT, up))
  while left(FORWARD, up):
    order += do((FORWARD, down)) if left(FORWARD, down) else []
    order += do((INPUT, down), (WEIGHT, down), (FORWARD, up), (INPUT, up), (WEIGHT, up))
  for _ in range(stage):
    order += do((INPUT, down), (INPUT, up))
  for _ in range(inner):
    order += do((INPUT, down), (WEIGHT, down))
  order += do(*[(WEIGHT, up)] * left(WEIGHT, up))
  return order + do(*[(WEIGHT, down)] * left(WEIGHT, down))


def alternate(forward: Sequence[Op], backward: Sequence[Op], ahead: int) -> list[Op]:
  """Returns `ahead` forward passes, then one of each in turn, then what is left."""
  ahead = min(ahead, len(forward))
  order = list(forward[:ahead])
  for at, op in enumerate(backward):
    order += forward[ahead + at : ahead + at + 1]
    order.append(op)
  return order


def _put_off(stage: int, microbatches: int, ahead: int, late: int) -> list[Op]:
  """1F1B of one stage, with the gradient of weights `late` microbatches after that of the input."""
  forward = [Op(FORWARD, stage, m) for m in range(microbatches)]
  order: list[Op] = []
  for op in alternate(forward, [Op(INPUT, stage, m) for m in range(microbatches)], ahead):
    order.append(op)
    if op.kind == INPUT and op.microbatch >= late:
      order.append(Op(WEIGHT, stage, op.microbatch - late))
  first = max(microbatches - late, 0)
  return order + [Op(WEIGHT, stage, m) for m in range(first, microbatches)]
