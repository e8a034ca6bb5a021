"""Counts what the collectives of a compiled program move, loops counted as often as they run."""

import collections
import math
import re
from collections.abc import Iterator

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'collective-permute', 'all-to-all')
_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2, 's64': 8, 'f64': 8}
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_COLLECTIVE = re.compile(rf'= (.*?) ({"|".join(KINDS)})(?:-start)?\(')
_CALLED = re.compile(
  r'(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def moved_bytes(text: str) -> dict[str, int]:
  """Returns the bytes that one device receives, by kind of collective.

  An all-gather brings what others have of its result; an all-reduce goes around twice. Where a loop
  runs as often as the data says, which the program does not tell, it is counted once.

  Args:
    text: the optimised program, from `compiled.as_text()`.
  """
  entry, bodies = _computations(text)
  sums: dict[str, int] = collections.Counter()
  for line, times in _lines(entry, bodies, 1):
    match = _COLLECTIVE.search(line)
    if match is not None:
      sums[match.group(2)] += times * _received(match.group(1), match.group(2), line)
  return dict(sums)


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
  entry, name = '', ''
  bodies: dict[str, list[str]] = {}
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header is not None:
      name = header.group(2)
      bodies[name] = []
      entry = name if header.group(1) else entry
    elif name:
      bodies[name].append(line)
  return entry, bodies


def _lines(name: str, bodies: dict[str, list[str]], times: int) -> Iterator[tuple[str, int]]:
  """Yields every line that runs, and how often."""
  for line in bodies.get(name, ()):
    yield line, times
    trips = _TRIPS.search(line)
    inner = times * (int(trips.group(1)) if trips is not None and ' while(' in line else 1)
    if _COLLECTIVE.search(line) is not None:
      continue
    called = _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
      called += [branch.strip().lstrip('%') for branch in branches.split(',')]
    for other in called:
      yield from _lines(other, bodies, inner)


def _received(shapes: str, kind: str, line: str) -> int:
  size = 0
  for dtype, dims in re.findall(r'(\w+)\[([\d,]*)\]', shapes):
    count = math.prod(int(dim) for dim in dims.split(',') if dim)
    size += count * _BYTES.get(dtype, 4)
  if kind == 'collective-permute':
    return size
  devices = _group(line)
  share = {'all-gather': 1, 'all-to-all': 1, 'all-reduce': 2, 'reduce-scatter': devices}[kind]
  return size * share * (devices - 1) // devices


def _group(line: str) -> int:
  """Returns how many devices take part together; groups are written in one of three ways."""
  mesh = re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', line)
  if mesh is not None:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh.group(2)))
  found = re.search(r'replica_groups=\[\d+,(\d+)\]', line)
  if found is not None:
    return int(found.group(1))
  found = re.search(r'replica_groups=\{\{([\d,]*)\}', line)
  if found is None:
    raise ValueError(f'no groups of devices in: {line.strip()[:200]}')
  return len(found.group(1).split(','))
