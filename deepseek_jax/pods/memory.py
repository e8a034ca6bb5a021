"""Memory of one device by class, from what the compiler says lies there when most does."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from deepseek_jax.pods.address import module_of, phase_of
from deepseek_jax.pods.hlo import Instruction, Module

CLASSES = (
  'parameters',
  'optimizer',
  'buffers',
  'other state',
  'batch',
  'gradients',
  'activations',
  'temporaries',
)
"""What memory holds, in the order of reports."""

_PEAK = re.compile(r'^\s*Live ranges at \d+ \(peak\):')
_LIVE = re.compile(r'^\s+(\S+?)\{([\d,]*)\}: (\d+) bytes')
_ARGUMENT = re.compile(r'state\.|batch\.|params|caches|variables')
_STATE = {
  'params': 'parameters',
  'opt_state': 'optimizer',
  'buffers': 'buffers',
  'ema': 'other state',
  'guard': 'other state',
  'carry': 'other state',
  'step': 'other state',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
  """One array that lies in memory when most does.

  Attributes:
    kind: of `CLASSES`.
    module: that made it; for an argument, its address.
    phase: of the step in which it was made.
    shape: as HLO writes it.
    bytes: padding included.
  """

  kind: str
  module: str
  phase: str
  shape: str
  bytes: int


def live_at_peak(text: str) -> dict[str, int]:
  """Reads names and bytes of what lies in memory when most does, from the compiler's dump."""
  found: dict[str, int] = {}
  inside = False
  for line in text.splitlines():
    if _PEAK.match(line):
      inside = True
    elif inside:
      match = _LIVE.match(line)
      if match is None:
        break
      name = match[1] + ('{' + match[2] + '}' if match[2] else '')
      found[name] = int(match[3])
  return found


def local_shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], int]]:
  """Returns shape and bytes on one device of every array of an abstract tree, by address."""
  result = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    shape = leaf.sharding.shard_shape(leaf.shape)
    size = 1
    for length in shape:
      size *= length
    result[jax.tree_util.keystr(path, simple=True, separator='/')] = (
      tuple(shape),
      size * leaf.dtype.itemsize,
    )
  return result


def bytes_by_class(state: Any) -> dict[str, int]:
  """Returns bytes of the arguments on one device, by class: counted from shapes, without padding.

  Args:
    state: abstract `TrainState`.
  """
  result = dict.fromkeys(('parameters', 'optimizer', 'buffers', 'other state'), 0)
  for field, kind in _STATE.items():
    if hasattr(state, field):
      result[kind] += sum(size for _, size in local_shapes(getattr(state, field)).values())
  return result


def held_at_peak(
  module: Module, live: Mapping[str, int], gradients: Sequence[tuple[int, ...]] = ()
) -> list[Held]:
  """Says of everything that lies in memory what it is and which module made it; largest first.

  Args:
    module: the program.
    live: from `live_at_peak`.
    gradients: shapes of the parameters on one device: what has one, in float32, and was made in
      the backward pass is a gradient.
  """
  table = {i.name: i for c in module.computations.values() for i in c.instructions}
  shapes = set(gradients)
  found = []
  for name, size in live.items():
    instruction = table.get(name.split('{')[0])
    if instruction is None:
      found.append(Held(kind='temporaries', module='step', phase='forward', shape='', bytes=size))
      continue
    found.append(_describe(name, instruction, size, shapes))
  return sorted(found, key=lambda held: -held.bytes)


def _describe(
  name: str, instruction: Instruction, size: int, gradients: set[tuple[int, ...]]
) -> Held:
  label = instruction.op_name
  if instruction.opcode == 'parameter' and re.match(
    r'state\.|batch\.|params|caches|variables', label
  ):
    return Held(
      kind=argument_class(label), module=label, phase='', shape=_shape(instruction), bytes=size
    )
  array = instruction.arrays[_place(name)] if instruction.arrays else None
  phase = phase_of(label)
  kind = 'temporaries'
  if array is not None and array.dtype == 'f32' and array.shape in gradients and phase != 'forward':
    kind = 'gradients'
  elif phase == 'forward' and 'jvp(' in label and 'vocabulary_loss' not in label:
    kind = 'activations'
  return Held(
    kind=kind,
    module=module_of(label),
    phase=phase,
    shape=_shape(instruction, _place(name)),
    bytes=size,
  )


def _place(name: str) -> int:
  """Which array of a tuple: the first number in `name{1,0}`; 0 for an array that is none."""
  match = re.search(r'\{(\d+)', name)
  return int(match[1]) if match else 0


def _shape(instruction: Instruction, place: int = 0) -> str:
  if place >= len(instruction.arrays):
    return ''
  array = instruction.arrays[place]
  return f'{array.dtype}[{",".join(map(str, array.shape))}]'


def argument_class(label: str) -> str:
  """Returns the class of an argument from its name in HLO, such as `state.params['head']`."""
  if label.startswith('batch'):
    return 'batch'
  match = re.match(r'(?:state\.)?\W*(\w+)', label)
  return _STATE.get(match[1], 'other state') if match else 'other state'


def sum_by_class(held: Sequence[Held]) -> dict[str, int]:
  """Adds bytes up by class, in the order of `CLASSES`."""
  return {kind: sum(h.bytes for h in held if h.kind == kind) for kind in CLASSES}
