"""Estimates the time of a compiled step by going through its schedule, instruction by instruction.

The model, in full:

- An instruction takes the longest of: its matrix products at the peak rate of their dtype, its
  other operations at the vector rate, its bytes at the bandwidth of the memory. Arrays beside the
  core cost no bytes; padding of arrays is not counted.
- Instructions run one after the other, as the compiler has ordered them. A loop's body counts as
  often as it runs, of the branches of a condition the longest.
- A collective takes its time on the torus (see `collective.collective_seconds`). One that is begun
  and ended apart runs beside what stands between; collectives wait for each other. Copies that are
  begun and ended apart run beside what stands between, too.
- A Pallas kernel costs what `kernels.kernel_cost` says.

It is a bound from below for a perfect compiler at this schedule: no start-up of instructions, no
bubbles in the matrix unit but those of sizes, no contention for memory. Nothing in it is fitted.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deepseek_jax.pods.address import module_of, phase_of
from deepseek_jax.pods.chips import Chip
from deepseek_jax.pods.collective import (
  Collective,
  collective_seconds,
  kind_of,
  lay_out,
  read_collective,
)
from deepseek_jax.pods.hlo import Computation, Instruction, Module, trip_count
from deepseek_jax.pods.origin import Origins
from deepseek_jax.pods.topology import Topology
from deepseek_jax.pods.work import KernelCost, Work, instruction_work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
  """What a program runs on.

  Attributes:
    topology: the slices.
    sizes: of the mesh's axes, in order.
    coords: of the devices in the order of the mesh: chip in the torus, die, slice.
  """

  topology: Topology
  sizes: Mapping[str, int]
  coords: Sequence[tuple[int, ...]]


def machine_of(topology: Topology, sizes: Mapping[Any, int], devices: Iterable[Any]) -> Machine:
  """Returns what a program on a mesh runs on.

  Args:
    topology: the slice.
    sizes: of the mesh's axes, in order.
    devices: in the order of the mesh. Those without a place, such as a host's, lie in a row.
  """
  coords: list[tuple[int, ...]] = []
  for number, device in enumerate(devices):
    place = getattr(device, 'coords', None)
    if place is None:
      coords.append((number, 0, 0, 0, 0))
    else:
      die = getattr(device, 'core_on_chip', 0) or 0
      coords.append((*place, die, getattr(device, 'slice_index', 0) or 0))
  named = {str(axis): size for axis, size in sizes.items()}
  return Machine(topology=topology, sizes=named, coords=coords)


@dataclasses.dataclass
class Tally:
  """What a step does on one device, by whose work it is.

  Attributes:
    work: by (module, phase).
    seconds: of instructions that no other hides, by (module, phase).
    exchanged: bytes that must be sent, by (mesh axes, module, kind).
    exchange_seconds: by mesh axes, hidden or not.
    exposed_seconds: by mesh axes, while nothing else ran.
    copy_seconds: of waiting for copies that were begun earlier.
    unknown_loops: `while` loops whose trips could not be read, counted once.
    unknown_kernels: kernels without a cost.
  """

  work: dict[tuple[str, str], Work] = dataclasses.field(default_factory=dict)
  seconds: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
  exchanged: dict[tuple[str, str, str], float] = dataclasses.field(default_factory=dict)
  exchange_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  exposed_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  copy_seconds: float = 0.0
  unknown_loops: list[str] = dataclasses.field(default_factory=list)
  unknown_kernels: list[str] = dataclasses.field(default_factory=list)
  total_seconds: float = 0.0

  def add(self, other: 'Tally', times: int) -> None:
    """Adds what another did, several times over."""
    for key, work in other.work.items():
      self.work[key] = self.work.get(key, Work()).plus(work, times)
    pairs: tuple[tuple[dict[Any, float], dict[Any, float]], ...] = (
      (self.seconds, other.seconds),
      (self.exchanged, other.exchanged),
      (self.exchange_seconds, other.exchange_seconds),
      (self.exposed_seconds, other.exposed_seconds),
    )
    for mine, theirs in pairs:
      for place, value in theirs.items():
        mine[place] = mine.get(place, 0.0) + times * value
    self.unknown_loops += other.unknown_loops
    self.unknown_kernels += other.unknown_kernels
    self.copy_seconds += times * other.copy_seconds
    self.total_seconds += times * other.total_seconds

  @property
  def all_work(self) -> Work:
    """The sum over modules and phases."""
    total = Work()
    for work in self.work.values():
      total = total.plus(work)
    return total


def work_seconds(work: Work, chip: Chip) -> float:
  """Returns the time of something that only this device does: the longest of three."""
  matrix = sum(flops / chip.rate(dtype) for dtype, flops in work.matrix_flops.items())
  vector = work.other_flops / chip.vector_flops
  return max(matrix, vector, work.bytes / chip.hbm_bandwidth)


def estimate(
  module: Module, machine: Machine, kernel_cost: KernelCost, cycles: bool = False
) -> Tally:
  """Goes through a module's schedule once, loops as often as they run.

  Args:
    module: scheduled, of one device of many.
    machine: what it runs on.
    kernel_cost: of Pallas calls.
    cycles: whether an instruction takes as long as the compiler thinks, where that is longer. The
      compiler knows layouts, padding and the sizes of the matrix unit; it knows no kernel's time.
  """
  walk = _Walk(module, machine, kernel_cost, cycles)
  return walk.tally(module.main)


class _Walk:
  """Goes through computations; each is gone through once."""

  def __init__(self, module: Module, machine: Machine, kernel_cost: KernelCost, cycles: bool):
    self.module, self.machine, self.kernel_cost = module, machine, kernel_cost
    self.cycles = cycles
    self.known: dict[str, Tally] = {}
    self.origins = Origins(module)

  def tally(self, home: Computation) -> Tally:
    if home.name not in self.known:
      self.known[home.name] = self._run(home)
    return self.known[home.name]

  def _run(self, home: Computation) -> Tally:
    tally, clock = Tally(), _Clock()
    for instruction in home.instructions:
      op = instruction.opcode
      if op == 'while':
        trips = trip_count(self.module, home, instruction)
        if trips is None:
          tally.unknown_loops.append(instruction.op_name or instruction.name)
        for body in self.module.inner(instruction, 'body'):
          self._nest(tally, clock, body, 1 if trips is None else trips)
      elif op == 'conditional':
        branches = list(self.module.inner(instruction))
        if branches:
          longest = max(branches, key=lambda body: self.tally(body).total_seconds)
          self._nest(tally, clock, longest, 1)
      elif op == 'call':
        for body in self.module.inner(instruction):
          self._nest(tally, clock, body, 1)
      elif kind_of(instruction) is not None:
        self._exchange(tally, clock, home, instruction, instruction)
      elif (aside := self._aside(home, instruction)) is not None:
        self._exchange(tally, clock, *aside, instruction)
      elif op.endswith(('-done', '-update')):
        self._finish(tally, clock, instruction)
      else:
        self._compute(tally, clock, home, instruction)
    tally.total_seconds = clock.now
    return tally

  def _nest(self, tally: Tally, clock: '_Clock', body: Computation, times: int) -> None:
    inner = self.tally(body)
    tally.add(inner, times)
    clock.now += times * inner.total_seconds

  def _compute(
    self, tally: Tally, clock: '_Clock', home: Computation, instruction: Instruction
  ) -> None:
    work = instruction_work(self.module, home, instruction, self.kernel_cost)
    if '"tpu_custom_call"' in instruction.rest and not work.flops:
      tally.unknown_kernels.append(instruction.op_name)
    if not (work.bytes or work.other_flops or work.flops):
      return
    label = self.origins.label(instruction.name)
    key = module_of(label), phase_of(label)
    tally.work[key] = tally.work.get(key, Work()).plus(work)
    chip = self.machine.topology.chip
    spent = work_seconds(work, chip)
    if self.cycles and instruction.cycles is not None:
      spent = max(spent, instruction.cycles / chip.clock_hz)
    if instruction.opcode in ('copy-start', 'slice-start'):
      clock.begin(instruction.name, spent, 'copies', None)
      return
    tally.seconds[key] = tally.seconds.get(key, 0.0) + spent
    clock.now += spent

  def _aside(
    self, home: Computation, instruction: Instruction
  ) -> tuple[Computation, Instruction] | None:
    """Returns the collective that is given to a core of its own here, and where it stands.

    From tpu7x on most are: `call-start` or `custom-call-start` names the program, `-update` gives
    it the operands, and `-done` waits.
    """
    if instruction.opcode not in ('call-update', 'custom-call-update'):
      return None
    start = home.by_name.get(instruction.operands[0])
    for body in [] if start is None else self.module.inner(start, 'called', 'to_apply'):
      for inside in body.instructions:
        if kind_of(inside) is not None:
          return body, inside
    return None

  def _exchange(
    self,
    tally: Tally,
    clock: '_Clock',
    home: Computation,
    instruction: Instruction,
    begins: Instruction,
  ) -> None:
    machine = self.machine
    found = read_collective(home, instruction, machine.sizes)
    if found is None or len(found.group) < 2:
      return
    spent = self._time(found)
    axes = '·'.join(found.axes) or 'none'
    place = (axes, module_of(self.origins.label(instruction.name)), found.kind)
    tally.exchanged[place] = tally.exchanged.get(place, 0.0) + found.sent
    tally.exchange_seconds[axes] = tally.exchange_seconds.get(axes, 0.0) + spent
    clock.begin(begins.name, spent, 'links', axes)
    if not begins.opcode.endswith(('-start', '-update')):
      self._wait(tally, clock, begins.name)

  def _time(self, found: Collective) -> float:
    machine = self.machine
    wires = lay_out(found.group, machine.coords, machine.topology)
    return collective_seconds(found, wires, machine.topology)

  def _finish(self, tally: Tally, clock: '_Clock', instruction: Instruction) -> None:
    for name in instruction.operands:
      self._wait(tally, clock, name)

  def _wait(self, tally: Tally, clock: '_Clock', name: str) -> None:
    waited, axes = clock.end(name)
    if axes is None:
      tally.copy_seconds += waited
    elif waited:
      tally.exposed_seconds[axes] = tally.exposed_seconds.get(axes, 0.0) + waited


class _Clock:
  """The time in one computation, and what runs beside it."""

  def __init__(self) -> None:
    self.now = 0.0
    self.free: dict[str, float] = {}
    self.running: dict[str, tuple[float, str | None]] = {}

  def begin(self, name: str, seconds: float, where: str, axes: str | None) -> None:
    end = max(self.now, self.free.get(where, 0.0)) + seconds
    self.free[where] = end
    self.running[name] = end, axes

  def end(self, name: str) -> tuple[float, str | None]:
    end, axes = self.running.pop(name, (self.now, None))
    waited = max(0.0, end - self.now)
    self.now += waited
    return waited, axes
