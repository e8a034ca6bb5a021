"""DualPipe: microbatches enter at both ends, and forward hides under backward."""

import dataclasses
from collections.abc import Iterator, Sequence

from deepseek_jax.pods.schedule.kinds import check_numbers
from deepseek_jax.pods.schedule.plan import BACKWARD, FORWARD, INPUT, WEIGHT, Cost, Op, Plan, Slot


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualPipe:
  """Half of the microbatches go through the devices in order, half in reverse.

  Device d has chunks d and p − 1 − d of p, so that all weights are held twice. In the middle of a
  step every device runs a forward chunk of one way and a backward chunk of the other together. It
  is assumed of such a pair that each computes while the other's tokens travel to experts and back:
  both take the longer of all their compute and all their exchange. Where nothing is exchanged the
  pair takes as long as its parts one after the other, and only the shorter way to the first
  backward pass is won.

  With F, B, W for forward, whole backward and the gradient of weights, F&B for a pair, p equal
  stages wait (p / 2 − 1)(F&B + B − 3W), and remember up to p + 1 chunks.

  Source: DeepSeek-V3, arXiv 2412.19437, section 3.2.1, table 2 and figure 5.
  """

  def chunks(self, stages: int) -> int:
    """Returns one chunk a stage; each is held twice."""
    return stages

  def faults(self, stages: int, microbatches: int) -> list[str]:
    """The two ways are alike, and each has as many microbatches as there are stages."""
    faults = []
    if stages % 2:
      faults.append(f'`stages` is {stages}; expected an even number')
    if microbatches % 2 or microbatches < 2 * stages:
      faults.append(
        f'`microbatches` is {microbatches}; expected an even number, {2 * stages} or more '
        f'for {stages} stages'
      )
    return faults

  def plan(self, stages: int, microbatches: int, costs: Sequence[Cost] = ()) -> Plan:
    """Returns the orders."""
    del costs
    check_numbers(self, stages, microbatches)
    forth = tuple(range(stages))
    half = microbatches // 2
    return Plan(
      routes=(forth, forth[::-1]),
      route_of=(0,) * half + (1,) * half,
      orders=tuple(_order(device, stages, half) for device in range(stages)),
    )


class _Way:
  """Work of one device for one of the two ways, microbatch by microbatch."""

  def __init__(self, chunk: int, first: int, put_off: list[Op]):
    self.chunk, self.put_off = chunk, put_off
    self.forwards: Iterator[int] = iter(range(first, 10**9))
    self.backwards: Iterator[int] = iter(range(first, 10**9))

  def forward(self) -> Op:
    return Op(FORWARD, self.chunk, next(self.forwards))

  def backward(self) -> Op:
    return Op(BACKWARD, self.chunk, next(self.backwards))

  def gradient_of_input(self) -> Op:
    op = Op(INPUT, self.chunk, next(self.backwards))
    self.put_off.append(op._replace(kind=WEIGHT))
    return op


def _order(device: int, stages: int, half: int) -> tuple[Slot, ...]:
  """The slots of one device; `half` microbatches go each way."""
  mirror = stages - 1 - device
  put_off: list[Op] = []
  ways = (_Way(device, 0, put_off), _Way(mirror, half, put_off))
  # The near way enters at the end of the pipeline that this device is closer to.
  near, far = ways if device < mirror else ways[::-1]
  depth = min(device, mirror)
  inner = stages // 2 - 1 - depth
  order: list[Slot] = [(near.forward(),) for _ in range(2 * inner)]
  for _ in range(depth + 1):
    order += [(near.forward(),), (far.forward(),)]
  for _ in range(inner):
    order += [(far.gradient_of_input(),), (put_off.pop(0),), (far.forward(),)]
  for number in range(half - stages + depth + 1):
    pair = (near.forward(), far.backward())
    # The two middle devices would delay their first result by waiting for what it overlaps with.
    order += [(pair[0],), (pair[1],)] if number == 0 and inner == 0 else [pair]
    order.append((far.forward(), near.backward()))
  for _ in range(inner):
    order += [(far.backward(),), (far.forward(), near.backward())]
  tail = [far, near] * (depth + 1)
  order += [(way.backward(),) for way in tail[: depth + 1]]
  order += [(way.gradient_of_input(),) for way in tail[depth + 1 :]]
  for _ in range(inner):
    order += [(put_off.pop(0),), (near.gradient_of_input(),)]
  return tuple(order + [(op,) for op in put_off])
