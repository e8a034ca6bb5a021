"""Reads optimised HLO text: computations, instructions, how often each runs."""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_HEADER = re.compile(r'^(ENTRY )?%?([^\s(]+) (?:\(.*\) -> .*)?\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([^\s=]+) = (.*)$')
_OPERAND = re.compile(r'%([^\s,(){}]+)')
_ARRAY = re.compile(r'([a-z][a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?')
_REFERENCE = re.compile(
  r'(calls|to_apply|condition|body|true_computation|false_computation)=%?([^\s,]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_CALLED = re.compile(r'called_computations=\{([^}]*)\}')
_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')

ITEM_BITS = {
  'pred': 8, 's2': 2, 'u2': 2, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16,
  's32': 32, 'u32': 32, 's64': 64, 'u64': 64, 'f4e2m1fn': 4, 'f8e8m0fnu': 8, 'f8e4m3fn': 8,
  'f8e5m2': 8, 'f8e4m3b11fnuz': 8, 'bf16': 16, 'f16': 16, 'f32': 32, 'f64': 64, 'c64': 64,
  'c128': 128,
}  # fmt: skip
"""Bits of an element; types without data, such as tokens, have none."""

MOST_CYCLES = 10**15
"""Estimates of the compiler from here on stand for `it does not know`."""


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a type.

  Attributes:
    dtype: as HLO names it.
    shape: sizes of its axes.
    space: of memory: 0 is the large one, 1 lies beside the core.
  """

  dtype: str
  shape: tuple[int, ...]
  space: int = 0

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.shape)

  @property
  def bytes(self) -> int:
    """Bytes without padding."""
    return -(-self.size * ITEM_BITS.get(self.dtype, 0) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of a computation.

  Attributes:
    name: unique in the module.
    opcode: such as `fusion`.
    type_text: of its result.
    operands: names of what it reads.
    rest: everything after the operands.
  """

  name: str
  opcode: str
  type_text: str
  operands: tuple[str, ...]
  rest: str
  arguments: str

  @functools.cached_property
  def arrays(self) -> tuple[Array, ...]:
    """The arrays of the result; of a tuple, all."""
    return parse_type(self.type_text)

  @functools.cached_property
  def op_name(self) -> str:
    """The scopes and primitive that it was traced from."""
    found = _NAME.search(self.rest)
    return found[1] if found else ''

  @functools.cached_property
  def called(self) -> dict[str, str]:
    """Computations it refers to, by role."""
    found = {role: name.rstrip(',') for role, name in _REFERENCE.findall(self.rest)}
    if (branches := _BRANCHES.search(self.rest)) is not None:
      for number, name in enumerate(branches[1].split(',')):
        found[f'branch_{number}'] = name.strip().lstrip('%')
    if (called := _CALLED.search(self.rest)) is not None:
      for number, name in enumerate(called[1].split(',')):
        found[f'called_{number}'] = name.strip().lstrip('%')
    return found

  def attribute(self, name: str) -> str | None:
    """Returns the text of an attribute up to the comma after it, braces kept whole."""
    start = self.rest.find(f' {name}=')
    if start < 0:
      return None
    start += len(name) + 2
    depth = 0
    for place, letter in enumerate(self.rest[start:], start):
      if letter in '{[(':
        depth += 1
      elif letter in '}])':
        depth -= 1
      elif letter == ',' and depth == 0:
        return self.rest[start:place]
    return self.rest[start:]

  def numbers(self, name: str) -> tuple[int, ...]:
    """Returns an attribute such as `dimensions={1,2}` as numbers; () where there is none."""
    return tuple(map(int, re.findall(r'\d+', self.attribute(name) or '')))

  @property
  def cycles(self) -> int | None:
    """The compiler's own estimate, None where it has none."""
    found = [int(text) for text in _CYCLES.findall(self.rest)]
    return sum(found) if found and max(found) < MOST_CYCLES else None

  def backend(self) -> dict[str, Any]:
    """Returns what the compiler's back end noted; {} where that is not data."""
    start = self.rest.find('backend_config={')
    if start < 0:
      return {}
    try:
      return json.JSONDecoder().raw_decode(self.rest, start + len('backend_config='))[0]
    except json.JSONDecodeError:
      return {}


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions in the order in which they run; one is the result."""

  name: str
  instructions: tuple[Instruction, ...]
  result: str

  @functools.cached_property
  def by_name(self) -> dict[str, Instruction]:
    """Its instructions."""
    return {i.name: i for i in self.instructions}

  @property
  def root(self) -> Instruction:
    """Its result."""
    return self.by_name[self.result]

  def parameter(self, number: int) -> Instruction | None:
    """Returns one of its parameters."""
    for i in self.instructions:
      if i.opcode == 'parameter' and i.arguments.strip() == str(number):
        return i
    return None

  def reads(self, instruction: Instruction) -> list[Array]:
    """Returns the arrays that an instruction reads, those of tuples one by one."""
    found: list[Array] = []
    for name in instruction.operands:
      if name in self.by_name:
        found += self.by_name[name].arrays
    return found


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled program."""

  computations: Mapping[str, Computation]
  entry: str

  @property
  def main(self) -> Computation:
    """Where it begins."""
    return self.computations[self.entry]

  def inner(self, instruction: Instruction, *roles: str) -> Iterator[Computation]:
    """Yields the computations that an instruction refers to in these roles; all if none given."""
    for role, name in instruction.called.items():
      if (not roles or role.startswith(roles)) and name in self.computations:
        yield self.computations[name]


def parse_type(text: str) -> tuple[Array, ...]:
  """Returns the arrays of a type such as `(f32[2,3]{1,0:T(8,128)S(1)}, s32[])`."""
  return tuple(
    Array(dtype, tuple(map(int, filter(None, shape.split(',')))), int('S(1)' in layout))
    for dtype, shape, layout in _ARRAY.findall(text)
  )


def parse(text: str) -> Module:
  """Reads a module.

  Raises:
    ValueError: there is no entry computation.
  """
  computations: dict[str, Computation] = {}
  entry: str | None = None
  name: str | None = None
  lines: list[tuple[str, str, bool]] = []
  for line in text.splitlines():
    if name is None:
      header = _HEADER.match(line)
      if header is not None and not line.startswith('HloModule'):
        name, lines = header[2], []
        entry = name if header[1] else entry
    elif line == '}' or line.startswith('}, execution_thread='):
      if lines:
        result = next((place for place, _, root in lines if root), lines[-1][0])
        found = tuple(_instruction(place, body) for place, body, _ in lines)
        computations[name] = Computation(name, found, result)
      name = None
    elif (match := _INSTRUCTION.match(line)) is not None:
      lines.append((match[2], match[3], bool(match[1])))
    elif lines:
      # What a kernel says of itself may have line ends.
      place, body, root = lines[-1]
      lines[-1] = (place, f'{body} {line}', root)
  if entry is None:
    raise ValueError('no ENTRY computation: this is no text of an HLO module')
  return Module(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
  end = _closing(text, 0) + 1 if text.startswith('(') else text.index(' ')
  type_text, rest = text[:end], text[end:].lstrip()
  start = rest.index('(')
  close = _closing(rest, start)
  inside = rest[start + 1 : close]
  operands = tuple(_OPERAND.findall(inside))
  return Instruction(name, rest[:start], type_text, operands, rest[close + 1 :], inside)


def _closing(text: str, start: int) -> int:
  """The place of the bracket that closes the one at `start`."""
  depth = 0
  for match in re.finditer(r'[()]', text[start:]):
    depth += 1 if match[0] == '(' else -1
    if depth == 0:
      return start + match.start()
  raise ValueError(f'unbalanced brackets in {text[:80]!r}')


def trip_count(module: Module, home: Computation, loop: Instruction) -> int | None:
  """Returns how often the body of a `while` runs; None where the program decides.

  The compiler may have written it down; else the condition must compare a counter, which begins at
  a constant and grows by one, with a constant.

  Args:
    module: the program.
    home: the computation that the loop is in.
    loop: the instruction.
  """
  if (known := _TRIPS.search(loop.rest)) is not None:
    return int(known[1])
  condition = next(module.inner(loop, 'condition'), None)
  if condition is None:
    return None
  test = condition.root
  if test.opcode == 'fusion' or len(test.operands) != 2:
    return None
  left, right = (condition.by_name.get(name) for name in test.operands)
  if left is None or right is None or test.attribute('direction') not in ('LT', None):
    return None
  limit = _constant(right)
  if left.opcode != 'get-tuple-element' or limit is None:
    return None
  start = home.by_name.get(loop.operands[0])
  if start is None or start.opcode != 'tuple':
    return limit
  first = home.by_name.get(start.operands[int(left.attribute('index') or 0)])
  for _ in range(4):
    if first is None or first.opcode not in ('copy', 'copy-done', 'copy-start', 'bitcast'):
      break
    first = home.by_name.get(first.operands[0]) if first.operands else None
  begin = None if first is None else _constant(first)
  return limit if begin is None else max(limit - begin, 0)


def _constant(instruction: Instruction) -> int | None:
  if instruction.opcode != 'constant':
    return None
  match = re.fullmatch(r'-?\d+', instruction.arguments.strip())
  return int(match[0]) if match else None
