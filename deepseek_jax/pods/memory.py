"""Memory of one device by class, from what the compiler says lies there when most does."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from deepseek_jax.pods.address import module_of, phase_of
from deepseek_jax.pods.hlo import Array, Module
from deepseek_jax.pods.origin import Origins

CLASSES = (
  'parameters',
  'optimizer',
  'buffers',
  'other state',
  'cache',
  'batch',
  'gradients',
  'activations',
  'temporaries',
)
"""What memory holds, in the order of reports."""

_PEAK = re.compile(r'^\s*Live ranges at \d+ \(peak\):')
_LIVE = re.compile(r'^\s+(\S+?)\{([\d,]*)\}: (\d+) bytes')
_ARGUMENT = re.compile(r'state\.|batch\.|tokens|positions|caches|variables')
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


def weights_by_shape(params: Any) -> dict[tuple[int, ...], str]:
  """Returns addresses of abstract parameters by shape on one device.

  Those that share a shape are told together: 'feed_forward/{gate,up}'.
  """
  found: dict[tuple[int, ...], list[str]] = {}
  for address, (shape, _) in local_shapes(params).items():
    found.setdefault(shape, []).append(address)
  return {shape: _together(addresses) for shape, addresses in found.items()}


def _together(addresses: list[str]) -> str:
  if len(addresses) == 1:
    return addresses[0]
  homes = {address.rpartition('/')[0] for address in addresses}
  if len(homes) > 1:
    return f'{addresses[0]} and {len(addresses) - 1} more'
  names = ','.join(address.rpartition('/')[2] for address in addresses)
  return f'{homes.pop()}/{{{names}}}'


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
  module: Module, live: Mapping[str, int], weights: Mapping[tuple[int, ...], str]
) -> list[Held]:
  """Says of everything that lies in memory what it is and which module made it; largest first.

  Args:
    module: the program.
    live: from `live_at_peak`.
    weights: addresses of the parameters by their shape on one device: a float32 array that has it
      and is no argument is a gradient.
  """
  origins = Origins(module)
  found = [_describe(origins, name, size, weights) for name, size in live.items()]
  return sorted(found, key=lambda held: -held.bytes)


def _describe(
  origins: Origins, name: str, size: int, weights: Mapping[tuple[int, ...], str]
) -> Held:
  plain, place = name.split('{')[0], _place(name)
  home = origins.homes.get(plain)
  if home is None:
    return Held(kind='temporaries', module='step', phase='forward', shape='', bytes=size)
  instruction = home.by_name[plain]
  arrays = instruction.arrays[place:]
  array = arrays[0] if arrays else Array('', ())
  shape = f'{array.dtype}[{",".join(map(str, array.shape))}]'
  label = origins.label(plain, place)
  if instruction.opcode == 'parameter' and _ARGUMENT.match(instruction.op_name):
    kind = argument_class(instruction.op_name)
    return Held(kind=kind, module=instruction.op_name, phase='', shape=shape, bytes=size)
  phase, address = phase_of(label), weights.get(array.shape)
  kind, where = 'temporaries', module_of(label)
  if address is not None:
    # Gradients and their sums; in another dtype, weights as they are multiplied with.
    kind, where = ('gradients' if array.dtype == 'f32' else 'temporaries'), address
  elif phase == 'forward' and 'jvp(' in label and 'vocabulary_loss' not in label:
    kind = 'activations'
  return Held(kind=kind, module=where, phase=phase, shape=shape, bytes=size)


def _place(name: str) -> int:
  """Which array of a tuple: the first number in `name{1,0}`; 0 for an array that is none."""
  match = re.search(r'\{(\d+)', name)
  return int(match[1]) if match else 0


def argument_class(label: str) -> str:
  """Returns the class of an argument from its name in HLO, such as `state.params['head']`."""
  if label.startswith(('batch', 'tokens', 'positions')):
    return 'batch'
  if label.startswith('caches'):
    return 'cache'
  label = label.removeprefix('variables')
  match = re.match(r'(?:state\.)?\W*(\w+)', label)
  return _STATE.get(match[1], 'other state') if match else 'other state'


def sum_by_class(held: Sequence[Held]) -> dict[str, int]:
  """Adds bytes up by class, in the order of `CLASSES`."""
  return {kind: sum(h.bytes for h in held if h.kind == kind) for kind in CLASSES}
