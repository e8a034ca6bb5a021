"""What a pipeline's devices do, in what order: the vocabulary that every schedule is written in."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

FORWARD, INPUT, WEIGHT, BACKWARD = 'F', 'B', 'W', 'BW'
"""Kinds of work: forward; the gradient of what came in; that of the weights; both at once."""


class Op(NamedTuple):
  """One piece of work: one chunk of the model, on one microbatch.

  Attributes:
    kind: `FORWARD`, `INPUT`, `WEIGHT` or `BACKWARD`.
    chunk: which of the model's chunks, from 0 at the embedding.
    microbatch: which, from 0.
  """

  kind: str
  chunk: int
  microbatch: int


Slot = tuple[Op, ...]
"""Work that a device does at one time: one piece, or two that overlap."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
  """What one chunk of the model costs for one microbatch.

  Times are in the unit of whoever made them, seconds or FLOPs; a plan does not care.

  Attributes:
    forward: time of the forward pass.
    backward_input: time of the gradient of what came in.
    backward_weight: time of the gradient of the weights, once the other is there.
    backward: time of both at once; less than the sum where they share work.
    forward_exchange: time that tokens are under way to experts and back, forward. It overlaps only
      with other work of the device, in a slot of two.
    backward_exchange: the same, backward; gradients of weights exchange nothing.
    kept_bytes: activations from the forward pass that wait for the backward pass.
    left_bytes: what still waits for the gradient of the weights once the other is there.
    parameter_bytes: weights.
  """

  forward: float
  backward_input: float
  backward_weight: float
  backward: float
  forward_exchange: float = 0.0
  backward_exchange: float = 0.0
  kept_bytes: float = 0.0
  left_bytes: float = 0.0
  parameter_bytes: float = 0.0

  @property
  def total(self) -> float:
    """Compute time of one microbatch, forward and backward, exchanges left out."""
    return self.forward + self.backward

  def compute(self, kind: str) -> float:
    """Returns the compute time of a kind of work."""
    return {
      FORWARD: self.forward,
      INPUT: self.backward_input,
      WEIGHT: self.backward_weight,
      BACKWARD: self.backward,
    }[kind]

  def exchange(self, kind: str) -> float:
    """Returns the time that a kind of work spends on exchanges."""
    if kind == WEIGHT:
      return 0.0
    return self.forward_exchange if kind == FORWARD else self.backward_exchange


def add_costs(costs: tuple[Cost, ...]) -> Cost:
  """Returns the cost of several neighbouring parts as one chunk."""
  names = [field.name for field in dataclasses.fields(Cost)]
  return Cost(**{name: sum(getattr(cost, name) for cost in costs) for name in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Who does what, in what order.

  Attributes:
    routes: for each way through the devices, the device of every chunk; most schedules have one
      way, a bidirectional one has two.
    route_of: for each microbatch, which way it takes.
    orders: for each device, its slots, first to last.
  """

  routes: tuple[tuple[int, ...], ...]
  route_of: tuple[int, ...]
  orders: tuple[tuple[Slot, ...], ...]

  @property
  def stages(self) -> int:
    """Number of devices."""
    return len(self.orders)

  @property
  def chunks(self) -> int:
    """Number of chunks that the model is cut into."""
    return len(self.routes[0])

  @property
  def microbatches(self) -> int:
    """Number of microbatches."""
    return len(self.route_of)

  def device(self, op: Op) -> int:
    """Returns the device that does a piece of work."""
    return self.routes[self.route_of[op.microbatch]][op.chunk]

  def ops(self) -> Iterator[Op]:
    """Yields every piece of work, device by device."""
    for order in self.orders:
      for slot in order:
        yield from slot

  def held(self, device: int) -> tuple[int, ...]:
    """Returns the chunks whose weights a device holds, once for each way through it."""
    return tuple(
      chunk for route in self.routes for chunk, place in enumerate(route) if place == device
    )

  def needs(self, op: Op) -> tuple[Op, ...]:
    """Returns the work that must be done before a piece of work can begin."""
    kind, chunk, microbatch = op
    if kind == FORWARD:
      return (Op(FORWARD, chunk - 1, microbatch),) if chunk else ()
    if kind == WEIGHT:
      return (Op(INPUT, chunk, microbatch),)
    own = Op(FORWARD, chunk, microbatch)
    if chunk == self.chunks - 1:
      return (own,)
    return own, Op(self._backward[chunk + 1, microbatch], chunk + 1, microbatch)

  @functools.cached_property
  def _backward(self) -> dict[tuple[int, int], str]:
    """How the gradient of what came in is made, by chunk and microbatch: alone or not."""
    return {(op.chunk, op.microbatch): op.kind for op in self.ops() if op.kind in (INPUT, BACKWARD)}
