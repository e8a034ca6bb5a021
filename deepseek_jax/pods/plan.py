"""A plan: what one device of a pod would hold and do in a step, as a value that is kept."""

import dataclasses
import json
from typing import Any

from deepseek_jax.pods.memory import Held


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
  """Memory of one device when most is held.

  Attributes:
    by_class: bytes of each of `memory.CLASSES`.
    peak_bytes: everything together, as the compiler lays it out.
    usable_bytes: what a program can use of the device.
    largest: the largest arrays that are no arguments.
  """

  by_class: dict[str, int]
  peak_bytes: int
  usable_bytes: int
  largest: tuple[Held, ...]

  @property
  def spare_bytes(self) -> int:
    """What is left over; negative if it does not fit."""
    return self.usable_bytes - self.peak_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """What the code of one module does in a step on one device.

  Attributes:
    module: its address.
    phase: of the step.
    flops: of matrix products.
    bytes: moved between memory and the core.
    seconds: estimated, exchanges not among them.
  """

  module: str
  phase: str
  flops: float
  bytes: float
  seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
  """What one device sends in a step for one module along some axes of the mesh.

  Attributes:
    axes: joined by a dot.
    module: its address.
    kind: of collective.
    bytes: sent by the device, at the least.
  """

  axes: str
  module: str
  kind: str
  bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Time:
  """The estimated time of a step.

  Attributes:
    step_seconds: in all, every instruction as fast as the device could be.
    slow_seconds: in all, every instruction as slow as the compiler thinks where that is slower.
    busy_seconds: of what the core does, by what bounds it: 'matrix', 'vector', 'memory'.
    exchange_seconds: of collectives, by mesh axes, hidden or not.
    exposed_seconds: of them while nothing else runs.
    bound: what takes longest, in words.
  """

  step_seconds: float
  slow_seconds: float
  busy_seconds: dict[str, float]
  exchange_seconds: dict[str, float]
  exposed_seconds: dict[str, float]
  bound: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What a program would be on a pod.

  Attributes:
    name: of the experiment.
    kind: 'train' or 'decode'.
    command: that makes this plan.
    topology: such as 'v5p:8x8x8'.
    mesh: sizes of its axes.
    tokens: of a step, over all devices.
    memory: of one device.
    parts: by module and phase.
    traffic: by axes, module and kind.
    time: estimated.
    model_flops: that the step needs by the model's own count, on one device.
    peak_flops: FLOP/s of one device in the dtype of its products.
    facts: other figures: seconds of compilation, the compiler's own counts, notes.
  """

  name: str
  kind: str
  command: str
  topology: str
  mesh: dict[str, int]
  tokens: int
  memory: Memory
  parts: tuple[Part, ...]
  traffic: tuple[Traffic, ...]
  time: Time
  model_flops: float
  peak_flops: float
  facts: dict[str, Any]

  @property
  def flops(self) -> float:
    """FLOPs of matrix products that a device does, those that are done again included."""
    return sum(part.flops for part in self.parts)

  @property
  def mfu(self) -> float:
    """Share of the peak that the model's own FLOPs are."""
    return self.model_flops / (self.time.step_seconds * self.peak_flops)

  @property
  def slow_mfu(self) -> float:
    """The same by the compiler's cycles."""
    return self.model_flops / (self.time.slow_seconds * self.peak_flops)

  @property
  def fits(self) -> bool:
    """Whether the device can hold it."""
    return self.memory.spare_bytes >= 0


def to_json(plan: Plan) -> str:
  """Returns a plan as text that `from_json` reads."""
  return json.dumps(dataclasses.asdict(plan), indent=1, ensure_ascii=False) + '\n'


def from_json(text: str) -> Plan:
  """Reads a plan.

  Raises:
    ValueError: the text is no plan.
  """
  try:
    data = json.loads(text)
    memory = data['memory']
    largest = tuple(Held(**held) for held in memory['largest'])
    return Plan(
      **data
      | {
        'memory': Memory(**memory | {'largest': largest}),
        'parts': tuple(Part(**part) for part in data['parts']),
        'traffic': tuple(Traffic(**item) for item in data['traffic']),
        'time': Time(**data['time']),
      }
    )
  except (KeyError, TypeError) as error:
    raise ValueError(f'no plan: {error!r}') from error
