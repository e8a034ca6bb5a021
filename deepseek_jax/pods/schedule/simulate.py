"""Runs a plan on costs, event by event: when everything happens, and how long all of it takes."""

import dataclasses
import heapq
from collections.abc import Sequence

from deepseek_jax.core.config import ConfigError
from deepseek_jax.pods.schedule.plan import (
  BACKWARD,
  FORWARD,
  INPUT,
  WEIGHT,
  Cost,
  Op,
  Plan,
  Slot,
)


@dataclasses.dataclass(frozen=True)
class Event:
  """A slot that was run.

  Attributes:
    device: which did it.
    slot: the work.
    start: when it began.
    end: when it was done.
  """

  device: int
  slot: Slot
  start: float
  end: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
  """What a plan comes to on given costs.

  Attributes:
    plan: the orders.
    costs: of every chunk.
    transfer: time from the end of work on one device until another has its result.
    events: every slot, ordered by start.
  """

  plan: Plan
  costs: tuple[Cost, ...]
  transfer: float
  events: tuple[Event, ...]

  @property
  def makespan(self) -> float:
    """From the first start to the last end."""
    return max(event.end for event in self.events)

  @property
  def busy(self) -> tuple[float, ...]:
    """Time that each device works or exchanges, and does not wait."""
    return tuple(sum(e.end - e.start for e in mine) for mine in self.by_device())

  @property
  def bubbles(self) -> tuple[float, ...]:
    """Share of the makespan that each device waits."""
    return tuple(1 - busy / self.makespan for busy in self.busy)

  @property
  def bubble(self) -> float:
    """Share of all devices' time that is spent waiting, from an empty pipeline to an empty one."""
    return sum(self.bubbles) / self.plan.stages

  @property
  def span(self) -> float:
    """Longest time of a device from its own first start to its own last end.

    That is what a step takes where the next one begins on each device as soon as it has finished
    this one, which needs an optimizer that does not wait for all devices.

    Source: Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241, sections 2.3 and 4.
    """
    return max(max(e.end for e in mine) - min(e.start for e in mine) for mine in self.by_device())

  @property
  def span_bubble(self) -> float:
    """Share of all devices' time spent waiting, where steps follow each other without a barrier."""
    return 1 - sum(self.busy) / (self.plan.stages * self.span)

  @property
  def compute_share(self) -> float:
    """Share of all devices' time from start to end in which they compute."""
    compute = sum(self.costs[op.chunk].compute(op.kind) for op in self.plan.ops())
    return compute / (self.plan.stages * self.makespan)

  def by_device(self) -> list[list[Event]]:
    """Returns the events of each device, in order."""
    found: list[list[Event]] = [[] for _ in self.plan.orders]
    for event in self.events:
      found[event.device].append(event)
    return found

  def peak_microbatches(self) -> tuple[float, ...]:
    """Returns the most microbatches each device remembers at once.

    A chunk counts as the share it is of a device's part of the model; a microbatch is remembered
    from its forward pass until the gradient of the weights is done.
    """
    share = self.plan.stages / self.plan.chunks
    return self._peak({FORWARD: lambda _: share, WEIGHT: lambda _: -share})

  def peak_bytes(self) -> tuple[float, ...]:
    """Returns the most bytes of activations that wait on each device at once."""
    return self._peak(
      {
        FORWARD: lambda cost: cost.kept_bytes,
        INPUT: lambda cost: cost.left_bytes - cost.kept_bytes,
        WEIGHT: lambda cost: -cost.left_bytes,
      }
    )

  def parameter_bytes(self) -> tuple[float, ...]:
    """Returns the bytes of weights on each device; a bidirectional schedule holds them twice."""
    held = (self.plan.held(device) for device in range(self.plan.stages))
    return tuple(sum(self.costs[chunk].parameter_bytes for chunk in mine) for mine in held)

  def _peak(self, changes: dict) -> tuple[float, ...]:
    """The largest running sum; what a slot makes is there when it begins, and goes at its end."""
    peaks = []
    for mine in self.by_device():
      now = most = 0.0
      for event in mine:
        made = gone = 0.0
        for kind, chunk, _ in event.slot:
          parts = (INPUT, WEIGHT) if kind == BACKWARD else (kind,)
          change = sum(changes[part](self.costs[chunk]) for part in parts if part in changes)
          made, gone = made + max(change, 0.0), gone + min(change, 0.0)
        most = max(most, now + made)
        now += made + gone
      peaks.append(most)
    return tuple(peaks)


def slot_time(slot: Slot, costs: Sequence[Cost]) -> float:
  """Returns how long a slot takes.

  One piece of work computes, then exchanges. Two that overlap compute one after the other, each
  while the other exchanges: together they take the longer of all compute and all exchange.

  Source: DeepSeek-V3, arXiv 2412.19437, section 3.2.1.
  """
  compute = sum(costs[op.chunk].compute(op.kind) for op in slot)
  exchange = sum(costs[op.chunk].exchange(op.kind) for op in slot)
  return compute + exchange if len(slot) == 1 else max(compute, exchange)


def simulate(plan: Plan, costs: Sequence[Cost], transfer: float = 0.0) -> Timeline:
  """Runs a plan: every device takes its slots in order, each as soon as all it needs is there.

  Args:
    plan: the orders.
    costs: of every chunk.
    transfer: time from the end of work on one device until another has its result. Nobody is busy
      with it.

  Raises:
    ConfigError: there are not as many costs as chunks, or the devices wait for each other forever.
  """
  if len(costs) != plan.chunks:
    raise ConfigError(f'found {len(costs)} costs, expected one for each of {plan.chunks} chunks')
  done: dict[Op, float] = {}
  waiting: dict[Op, list[int]] = {}
  place = [0] * plan.stages
  free = [0.0] * plan.stages
  events: list[Event] = []
  queue = [(0.0, device) for device in range(plan.stages)]
  while queue:
    _, device = heapq.heappop(queue)
    if place[device] == len(plan.orders[device]):
      continue
    slot = plan.orders[device][place[device]]
    before = [need for op in slot for need in plan.needs(op) if need not in slot]
    missing = next((need for need in before if need not in done), None)
    if missing is not None:
      waiting.setdefault(missing, []).append(device)
      continue
    late = [done[need] + (plan.device(need) != device) * transfer for need in before]
    start = max([free[device], *late])
    end = start + slot_time(slot, costs)
    events.append(Event(device, slot, start, end))
    free[device], place[device] = end, place[device] + 1
    heapq.heappush(queue, (end, device))
    for op in slot:
      done[op] = end
      for other in waiting.pop(op, ()):
        heapq.heappush(queue, (end, other))
  _check_finished(plan, place)
  events.sort(key=lambda event: (event.start, event.device, event.end))
  return Timeline(plan=plan, costs=tuple(costs), transfer=transfer, events=tuple(events))


def _check_finished(plan: Plan, place: list[int]) -> None:
  stuck = [
    f'device {device} never gets to {"&".join(map(str, order[at]))}'
    for device, (order, at) in enumerate(zip(plan.orders, place, strict=True))
    if at < len(order)
  ]
  if stuck:
    raise ConfigError(f'the orders wait for each other: {fault}' for fault in stuck)
