"""Schedules that are found by trying: each device takes the best work there is."""

import dataclasses
import heapq
import itertools
from collections.abc import Sequence
from typing import Literal, get_args

from deepseek_jax.core.config import ConfigError
from deepseek_jax.pods.schedule.kinds import ZeroBubbleV, check_numbers, one_way
from deepseek_jax.pods.schedule.plan import FORWARD, INPUT, WEIGHT, Cost, Op, Plan
from deepseek_jax.pods.schedule.simulate import simulate, slot_time

Order = Literal['chunk', 'microbatch']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """How a device chooses among what it could do.

  Attributes:
    kinds: of work, the most wanted first.
    order: among forward passes, whether the later chunk goes before the earlier microbatch.
    patience: waits for a pass that arrives within this share of the time of the gradient of
      weights that it could make meanwhile.
  """

  kinds: tuple[str, ...]
  order: Order
  patience: float


RULES = tuple(
  Rule(kinds=kinds, order=order, patience=patience)
  for kinds, order, patience in itertools.product(
    ((INPUT, FORWARD, WEIGHT), (FORWARD, INPUT, WEIGHT)),
    get_args(Order),
    (0.0, 0.6),
  )
)

SHARES = (1.0, 0.8, 0.65)
"""Limits to begin another microbatch at; one that was begun goes on, and takes room later."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Searched:
  """Two chunks a device as in `ZeroBubbleV`, in orders that are found for the costs there are.

  Every rule of choosing is tried with several limits on memory, and the shortest plan that keeps
  to `memory` is taken; the orders of `ZeroBubbleV` are among those tried.

  Attributes:
    memory: microbatches that a device may remember, as a multiple of the stages; 1 is what the
      first stage of 1F1B does.

  Source: in the manner of Qi et al., arXiv 2401.10241, section 3.1.
  """

  memory: float = 1.0

  def __post_init__(self):
    if self.memory < 1:
      raise ConfigError(f'`memory` is {self.memory}; expected 1 or more')

  def chunks(self, stages: int) -> int:
    """Returns two chunks a stage."""
    return 2 * stages

  def faults(self, stages: int, microbatches: int) -> list[str]:
    """Returns nothing: any numbers will do."""
    del stages, microbatches
    return []

  def plan(self, stages: int, microbatches: int, costs: Sequence[Cost]) -> Plan:
    """Returns the best orders found for these costs, one a chunk.

    Raises:
      ConfigError: there are not as many costs as chunks.
    """
    check_numbers(self, stages, microbatches)
    known = ZeroBubbleV().plan(stages, microbatches)
    best, shortest = known, simulate(known, costs).makespan
    devices = list(known.routes[0])
    for rule, share in itertools.product(RULES, SHARES):
      limit = max(1, round(2 * self.memory * stages * share))
      orders = _Search(devices, microbatches, costs, limit, rule).run()
      found = simulate(one_way(devices, microbatches, orders), costs)
      fits = max(found.peak_microbatches()) <= self.memory * stages
      if fits and found.makespan < shortest:
        best, shortest = found.plan, found.makespan
    return best


class _Search:
  """One pass through time: whenever a device is free it chooses by a rule."""

  def __init__(self, devices, microbatches, costs, limit, rule):
    self.devices, self.costs, self.limit, self.rule = devices, costs, limit, rule
    stages = max(devices) + 1
    self.orders: list[list[Op]] = [[] for _ in range(stages)]
    self.free = [0.0] * stages
    self.remembered = [0] * stages
    # What could be done on each device, and from when on.
    self.ready: list[dict[Op, float]] = [{} for _ in range(stages)]
    self.first = {device: devices.index(device) for device in devices}
    for m in range(microbatches):
      self.ready[devices[0]][Op(FORWARD, 0, m)] = 0.0

  def run(self) -> list[list[Op]]:
    """Returns the orders."""
    queue = [(0.0, device) for device in range(len(self.orders))]
    while queue:
      now, device = heapq.heappop(queue)
      if self.free[device] > now:
        continue
      op, wait = self._choose(device, now)
      if op is None:
        if wait is not None:
          heapq.heappush(queue, (wait, device))
        continue
      end = now + slot_time((op,), self.costs)
      del self.ready[device][op]
      self.orders[device].append(op)
      self.free[device] = end
      self.remembered[device] += {FORWARD: 1, WEIGHT: -1}.get(op.kind, 0)
      heapq.heappush(queue, (end, device))
      for follower in self._followers(op):
        home = self.devices[follower.chunk]
        self.ready[home][follower] = end
        heapq.heappush(queue, (end, home))
    return self.orders

  def _followers(self, op: Op) -> list[Op]:
    last = len(self.costs) - 1
    if op.kind == FORWARD:
      ahead = Op(INPUT, last, op.microbatch)
      return [ahead if op.chunk == last else op._replace(chunk=op.chunk + 1)]
    if op.kind == INPUT:
      own = [op._replace(kind=WEIGHT)]
      return own + ([op._replace(chunk=op.chunk - 1)] if op.chunk else [])
    return []

  def _choose(self, device: int, now: float) -> tuple[Op | None, float | None]:
    """Returns the work to begin, or when to look again."""
    full = self.remembered[device] >= self.limit

    def allowed(op: Op) -> bool:
      return op.kind != FORWARD or op.chunk != self.first[device] or not full

    could = {op: at for op, at in self.ready[device].items() if allowed(op)}
    here = [op for op, at in could.items() if at <= now]
    later = [at for op, at in could.items() if at > now]
    if not here:
      return None, min(later, default=None)
    best = min(here, key=self._rank)
    if best.kind == WEIGHT and later:
      patience = self.rule.patience * self.costs[best.chunk].backward_weight
      if min(later) < now + patience:
        return None, min(later)
    return best, None

  def _rank(self, op: Op) -> tuple:
    deep = self.rule.order == 'chunk' or op.kind == INPUT
    depth = -op.chunk if deep else 0
    return self.rule.kinds.index(op.kind), depth, op.microbatch, -op.chunk
