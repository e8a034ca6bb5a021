"""What a compiled program sends between devices, by axis of the mesh: read from its HLO text."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

BYTES = {
  'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 's32': 4, 'u32': 4,
  's64': 8, 'u64': 8, 'f16': 2, 'bf16': 2, 'f32': 4, 'f64': 8, 'c64': 8, 'c128': 16,
}  # fmt: skip
"""Bytes of an element; all of the eight-bit floats begin with f8."""

KINDS = ('all-reduce', 'all-gather', 'all-to-all', 'reduce-scatter', 'collective-permute',
         'ragged-all-to-all', 'collective-broadcast')  # fmt: skip

_OPERATION = re.compile(rf' ({"|".join(KINDS)})(-start)?\(')
_SHAPE = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
_CALLED = re.compile(r'(?:calls|to_apply|condition|branch_computations|\w+_computation)='
                     r'(\{[^}]*\}|%?[\w.\-]+)')  # fmt: skip
_BODY = re.compile(r'\bbody=%?([\w.\-]+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(r'replica_groups=(\{\{.*?\}\}|\{\}|mesh\[.*?\] *\{.*?\}|\[[\d,]+\]<=\[[\d,]+\]'
                     r'(?:T\([\d,]+\))?)')  # fmt: skip
_LISTS = re.compile(r'[\[(]([\d,]+)[\])]')
_PAIRS = re.compile(r'source_target_pairs=\{(.*?\})\}')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One operation of a program by which devices exchange data.

  Attributes:
    kind: such as 'all-reduce'.
    axes: mesh axes along which the devices that exchange differ.
    dtypes: of what travels.
    size: devices of a group.
    payload: bytes of the result, on one device.
    times: how often it runs; loops of unknown length count once.
    name: where in the program it comes from.
  """

  kind: str
  axes: tuple[str, ...]
  dtypes: tuple[str, ...]
  size: int
  payload: float
  times: int
  name: str

  @property
  def sent_bytes(self) -> float:
    """Bytes that a device sends, in all runs, by the algorithm that sends fewest (a ring)."""
    others = (self.size - 1) / self.size
    factor = {'all-reduce': 2 * others, 'reduce-scatter': self.size - 1, 'collective-permute': 1}
    return self.payload * self.times * factor.get(self.kind, others)


def read_collectives(hlo: str, sizes: Mapping[str, int]) -> list[Collective]:
  """Lists the collectives of a compiled program.

  Args:
    hlo: its text, after partitioning.
    sizes: mesh axis → devices, in the order of the mesh.
  """
  lines = _by_computation(hlo)
  times = _times(lines)
  found = []
  for computation, body in lines.items():
    for line in body:
      match = _OPERATION.search(line)
      if match is None or ' = ' not in line or times.get(computation, 0) == 0:
        continue
      shapes = _SHAPE.findall(line[line.index(' = ') + 3 : match.start()])
      if match[2] and match[1] != 'all-reduce':
        # What an asynchronous one starts with is listed before its result.
        shapes = shapes[len(shapes) // 2 :]
      groups = _groups(line, sizes)
      size = len(groups[0]) if match[1] != 'collective-permute' else 2
      name = re.search(r'op_name="([^"]*)"', line)
      found.append(
        Collective(
          kind=match[1],
          axes=_axes(groups, sizes),
          dtypes=tuple(dict.fromkeys(dtype for dtype, _ in shapes)),
          size=size,
          payload=sum(map(_bytes, shapes)),
          times=times[computation],
          name=name[1] if name else '',
        )
      )
  return [collective for collective in found if collective.axes]


def sent_by_axes(collectives: Iterable[Collective]) -> dict[tuple[str, ...], float]:
  """Returns the bytes that a device sends in one run of the program, by mesh axes."""
  total: dict[tuple[str, ...], float] = {}
  for collective in collectives:
    total[collective.axes] = total.get(collective.axes, 0.0) + collective.sent_bytes
  return total


def _bytes(shape: tuple[str, str]) -> float:
  dtype, dims = shape
  each = BYTES.get(dtype, 1 if dtype.startswith('f8') else 0)
  return each * math.prod(int(dim) for dim in dims.split(',') if dim)


def _by_computation(hlo: str) -> dict[str, list[str]]:
  """The lines of every computation; that of the entry has the name ''."""
  found: dict[str, list[str]] = {}
  current: list[str] = []
  for line in hlo.splitlines():
    start = _COMPUTATION.match(line)
    if start:
      current = found.setdefault('' if start[1] else start[2], [])
    else:
      current.append(line)
  return found


def _times(lines: dict[str, list[str]]) -> dict[str, int]:
  """How often each computation runs in one run of the entry; of branches, every one counts."""
  times = {'': 1}
  # A computation is written before those that call it, the entry last.
  for caller in reversed(lines):
    for line in lines[caller]:
      trips, body = _TRIPS.search(line), _BODY.search(line)
      called = [(body[1], int(trips[1]) if trips else 1)] if body else []
      for names in _CALLED.findall(line):
        called += [(name.strip('%{} '), 1) for name in names.split(',')]
      for name, count in called:
        times[name] = times.get(name, 0) + times.get(caller, 0) * count
  return times


def _groups(line: str, sizes: Mapping[str, int]) -> list[list[int]]:
  """Devices, by their place in the mesh, that exchange with each other."""
  devices = math.prod(sizes.values())
  pairs = _PAIRS.search(line)
  if pairs:
    return [[int(n) for n in pair.split(',')] for pair in re.findall(r'\{([\d,]+)\}', pairs[0])]
  match = _GROUPS.search(line)
  text = match[1] if match else '{}'
  if text == '{}':
    return [list(range(devices))]
  if text.startswith('{{'):
    return [[int(n) for n in group.split(',')] for group in re.findall(r'\{([\d,]+)\}', text)]
  if text.startswith('mesh'):
    names = re.findall(r"'(\w+)'=(\d+)", text)
    chosen = re.findall(r"'(\w+)'", text[text.index(']') :])
    sizes_there = [int(size) for _, size in names]
    places = [place for place, (name, _) in enumerate(names) if name in chosen]
    grid = np.arange(devices).reshape(sizes_there)
    grid = np.moveaxis(grid, places, range(-len(places), 0))
    return grid.reshape(-1, math.prod(sizes_there[place] for place in places)).tolist()
  # [groups, size]<=[source shape]T(order): numbers in that shape, transposed, and cut anew.
  shape, source, *order = ([int(n) for n in part.split(',')] for part in _LISTS.findall(text))
  ids = np.arange(devices).reshape(source)
  return (ids.transpose(order[0]) if order else ids).reshape(shape).tolist()


def _axes(groups: list[list[int]], sizes: Mapping[str, int]) -> tuple[str, ...]:
  """The mesh axes along which devices of a group differ."""
  shape = tuple(sizes.values())
  differ: set[int] = set()
  for group in groups:
    places = np.array(np.unravel_index(group, shape))
    differ |= {axis for axis, row in enumerate(places) if len(set(row.tolist())) > 1}
  return tuple(name for axis, name in enumerate(sizes) if axis in differ)
