"""Collectives of optimised HLO: over which mesh axes they go, and their time on a torus."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from deepseek_jax.pods.hlo import Array, Computation, Instruction
from deepseek_jax.pods.topology import Topology

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)

_NAMED = re.compile(r'replica_groups=(mesh\[[^\]]*\](?:, device_ids=\([^)]*\)\)?)? ?\{[^}]*\})')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange between devices.

  Attributes:
    kind: of `KINDS`.
    axes: mesh axes along which its devices differ.
    group: devices of one group, by their place in the mesh, in order.
    bytes: of the whole array on one device: the result of a gather, the operand otherwise.
  """

  kind: str
  axes: tuple[str, ...]
  group: tuple[int, ...]
  bytes: float

  @property
  def sent(self) -> float:
    """Bytes that a device must send at least: nothing is counted for what stays."""
    count = len(self.group)
    if self.kind == 'all-reduce':
      return 2.0 * self.bytes * (count - 1) / max(count, 1)
    if self.kind == 'collective-permute':
      return self.bytes
    return self.bytes * (count - 1) / max(count, 1)


def kind_of(instruction: Instruction) -> str | None:
  """Returns which collective an instruction is or begins, None if it is none or ends one."""
  op = instruction.opcode.removesuffix('-start')
  return op if op in KINDS else None


def read_collective(
  home: Computation, instruction: Instruction, sizes: Mapping[str, int]
) -> Collective | None:
  """Reads a collective; None if the instruction is none.

  Args:
    home: the computation that it is in.
    instruction: any.
    sizes: of the mesh's axes, in order.
  """
  kind = kind_of(instruction)
  if kind is None:
    return None
  group = first_group(instruction, math.prod(sizes.values()))
  reads = home.reads(instruction)
  if kind == 'all-gather':
    # The first arrays of an asynchronous one are the operands again.
    results = instruction.arrays
    size = _bytes(results[len(reads) :] if instruction.opcode.endswith('-start') else results)
  elif kind == 'ragged-all-to-all':
    # From rows to a room that is larger, or back: what travels are the rows.
    size = min(_bytes(reads[:1]), _bytes(reads[1:2]))
  else:
    size = _bytes(a for a in reads if a.dtype != 'token')
  return Collective(kind, varying_axes(group, sizes), tuple(group), size)


def _bytes(arrays: Iterable[Array]) -> float:
  return float(sum(array.bytes for array in arrays))


def first_group(instruction: Instruction, devices: int) -> list[int]:
  """Returns the first group of devices that exchange something, by their place in the mesh."""
  pairs = instruction.attribute('source_target_pairs')
  if pairs is not None:
    return _cycle([tuple(map(int, p)) for p in re.findall(r'\{(\d+),(\d+)\}', pairs)])
  if (named := _NAMED.search(instruction.rest)) is not None:
    return _mesh_group(named[1])
  text = (instruction.attribute('replica_groups') or '').strip()
  if text.startswith('{{'):
    return [int(n) for n in text[2 : text.index('}')].split(',') if n]
  match = re.match(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  if match is not None:
    groups, dims, order = (
      tuple(map(int, part.split(','))) if part else () for part in match.groups()
    )
    ids = np.arange(math.prod(dims)).reshape(dims)
    ids = ids.transpose(order) if order else ids
    return ids.reshape(groups)[0].tolist() if len(groups) > 1 else ids.reshape(-1).tolist()
  return list(range(devices))


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(map(int, filter(None, text.split(','))))


def _cycle(pairs: Sequence[tuple[int, ...]]) -> list[int]:
  """The devices that one device's data reaches, step by step."""
  following = {pair[0]: pair[1] for pair in pairs}
  moving = [a for a, b in pairs if a != b]
  if not moving:
    return [0]
  path = [moving[0]]
  while (after := following.get(path[-1])) is not None and after not in path:
    path.append(after)
  return path


def _mesh_group(text: str) -> list[int]:
  """Of groups such as `mesh['a'=2,'b'=4] {'b'}`, with parts of axes as `'b':(2)2`."""
  close = text.index(']')
  axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", text[:close])]
  shape = [size for _, size in axes]
  ids = np.arange(math.prod(shape))
  rest = text[close + 1 :]
  turned = re.match(r', device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\)', rest)
  listed = re.match(r', device_ids=\(([\d,]+)\)', rest)
  if turned is not None:
    dims, turn = (_numbers(part) for part in turned.groups())
    ids = ids.reshape(dims).transpose(turn).reshape(-1)
  elif listed is not None:
    ids = np.array(_numbers(listed[1]))
  ids = ids.reshape(shape)
  chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", rest[rest.rindex('{') :])
  names = [name for name, _ in axes]
  index: list[slice | int] = [0] * len(axes)
  for name, before, part in chosen:
    place = names.index(name)
    if part:
      step = shape[place] // int(before) // int(part)
      index[place] = slice(0, step * int(part), step)
    else:
      index[place] = slice(None)
  return ids[tuple(index)].reshape(-1).tolist()


def varying_axes(group: Sequence[int], sizes: Mapping[str, int]) -> tuple[str, ...]:
  """Returns the mesh axes along which the devices of a group differ."""
  places = np.array(np.unravel_index(np.asarray(group), tuple(sizes.values())))
  return tuple(name for name, row in zip(sizes, places) if len(set(row.tolist())) > 1)


@dataclasses.dataclass(frozen=True)
class Wires:
  """How one group of devices lies on the torus.

  Attributes:
    points: distinct places along each axis of the torus, axes with one left out.
    ways: directions along each of those axes: 2 of a ring, 1 of an open line.
    stretch: links between neighbours of the group along each of them.
    slices: slices that the group spans.
    dies: devices of a chip that it has.
  """

  points: tuple[int, ...]
  ways: tuple[int, ...]
  stretch: tuple[int, ...]
  slices: int = 1
  dies: int = 1


def lay_out(group: Sequence[int], coords: Sequence[tuple[int, ...]], topology: Topology) -> Wires:
  """Finds where a group lies on the torus.

  Args:
    group: devices by their place in the mesh.
    coords: of every device of the mesh: its chip's place in the torus, its die, its slice.
    topology: the slices.
  """
  places = [coords[device] for device in group]
  points, ways, stretch = [], [], []
  for axis, length in enumerate(topology.shape):
    found = sorted({place[axis] for place in places})
    if len(found) > 1:
      step = max(1, min(b - a for a, b in itertools.pairwise(found)))
      whole = len(found) * step >= length
      points.append(len(found))
      ways.append(2 if whole and length % topology.chip.ring == 0 else 1)
      stretch.append(step)
  dies = len({place[-2] for place in places})
  return Wires(
    tuple(points), tuple(ways), tuple(stretch), len({place[-1] for place in places}), dies
  )


def collective_seconds(collective: Collective, wires: Wires, topology: Topology) -> float:
  """Returns the time of a collective that has the links for itself.

  On a ring both directions are used, on an open line one bounds; several axes are used at once,
  each for its share. A gather, scatter or reduction passes every piece along every link once. An
  exchange of everybody with everybody is bounded by the links across the longest axis. Groups that
  interleave along an axis share its links. Between slices the slower of both networks counts; two
  dies of one chip exchange as if over a link of their chip for each axis of the torus, which is
  less than they have. Nothing is faster than the first byte's longest way.

  Source: the scaling book of JAX, "Sharded matrices and how to multiply them".
  """
  chip, sent = topology.chip, collective.sent
  if len(collective.group) < 2 or sent == 0:
    return 0.0
  outside = 0.0
  if wires.slices > 1:
    outside = sent / chip.dcn_bandwidth
  if not wires.points:
    inside = sent / (2 * chip.ici_axes * chip.ici_link) if wires.dies > 1 else 0.0
    return max(inside, outside)
  if collective.kind in ('all-to-all', 'ragged-all-to-all'):
    # Mean way of a quarter of a ring, a third of a line, over links in both directions.
    inside = max(
      sent * points / (4 * ways) * step / chip.ici_link
      for points, ways, step in zip(wires.points, wires.ways, wires.stretch)
    )
  elif collective.kind == 'collective-permute':
    inside = sent * min(wires.stretch) / chip.ici_link
  else:
    each = [ways * chip.ici_link / step for ways, step in zip(wires.ways, wires.stretch)]
    inside = sent / sum(each)
  return max(inside, outside, hops(wires) * chip.hop_seconds)


def hops(wires: Wires) -> int:
  """Returns the links on the longest way through a group; both ways round a ring are taken."""
  return sum(
    points // 2 * step if ways == 2 else (points - 1) * step
    for points, ways, step in zip(wires.points, wires.ways, wires.stretch)
  )
