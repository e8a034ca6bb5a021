"""What one instruction of optimised HLO does: FLOPs of matrix products, others, bytes moved."""

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np

from deepseek_jax.pods.hlo import Array, Computation, Instruction, Module

KERNEL = 'tpu_custom_call'
"""The target of a Pallas kernel's call."""

FREE = frozenset({
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'opt-barrier',
  'partition-id', 'replica-id', 'iota', 'domain', 'copy-done', 'async-done',
  'call-start', 'call-update', 'call-done', 'custom-call-start', 'custom-call-update',
  'custom-call-done', 'all-gather-done', 'all-reduce-done', 'collective-permute-done', 'recv-done',
  'send-done', 'reduce-scatter-done', 'all-to-all-done',
})  # fmt: skip
"""Instructions that move nothing."""

_SLICES = ('dynamic-slice', 'slice', 'gather')


@dataclasses.dataclass(frozen=True)
class Work:
  """What something does once, or in a step, on one device.

  Attributes:
    matrix_flops: FLOPs of matrix products, by dtype of their operands.
    other_flops: FLOPs of everything else, one an element.
    bytes: moved between memory and the core.
    kernel_flops: those of `matrix_flops` that kernels do.
  """

  matrix_flops: dict[str, float] = dataclasses.field(default_factory=dict)
  other_flops: float = 0.0
  bytes: float = 0.0
  kernel_flops: float = 0.0

  @property
  def flops(self) -> float:
    """FLOPs of matrix products."""
    return sum(self.matrix_flops.values())

  def plus(self, other: 'Work', times: float = 1.0) -> 'Work':
    """Returns this and `times` another."""
    flops = dict(self.matrix_flops)
    for dtype, count in other.matrix_flops.items():
      flops[dtype] = flops.get(dtype, 0.0) + times * count
    return Work(
      flops,
      self.other_flops + times * other.other_flops,
      self.bytes + times * other.bytes,
      self.kernel_flops + times * other.kernel_flops,
    )


KernelCost = Callable[[Computation, Instruction], Work | None]
"""Says what a kernel's call does, None where it does not know the kernel."""


def instruction_work(
  module: Module, home: Computation, instruction: Instruction, kernel_cost: KernelCost
) -> Work:
  """Returns what one instruction does once, what it calls included; loops are left to the caller.

  Args:
    module: the program.
    home: the computation that the instruction is in.
    instruction: no `while`, `conditional` or `call`.
    kernel_cost: of Pallas calls.
  """
  op = instruction.opcode
  if op in FREE:
    return Work()
  if op == 'custom-call':
    if KERNEL in instruction.rest:
      return kernel_cost(home, instruction) or Work(bytes=_moved(module, home, instruction))
    if '"AllocateBuffer"' in instruction.rest:
      return Work()
  inside = _flops(module, home, instruction)
  return Work(inside.matrix_flops, inside.other_flops, _moved(module, home, instruction))


def _flops(module: Module, home: Computation, instruction: Instruction) -> Work:
  op = instruction.opcode
  if op == 'dot':
    return Work({_dtype(home, instruction): dot_flops(home, instruction)})
  if op == 'convolution':
    return Work({_dtype(home, instruction): convolution_flops(home, instruction)})
  if op in ('fusion', 'call', 'async-start'):
    total = Work()
    for computation in module.inner(instruction, 'calls', 'to_apply'):
      for inner in computation.instructions:
        total = total.plus(_flops(module, computation, inner))
    return total
  if op in ('reduce', 'reduce-window'):
    return Work(other_flops=sum(array.size for array in home.reads(instruction)))
  if op in FREE or op in ('copy', 'broadcast', 'reshape', 'transpose', 'pad', *_SLICES):
    return Work()
  return Work(other_flops=sum(array.size for array in instruction.arrays))


def _dtype(home: Computation, instruction: Instruction) -> str:
  first = home.by_name.get(instruction.operands[0])
  return first.arrays[0].dtype if first is not None and first.arrays else 'bf16'


def dot_flops(home: Computation, dot: Instruction) -> float:
  """Returns the FLOPs of a `dot`: two for each product that is summed."""
  left = home.by_name[dot.operands[0]].arrays[0]
  summed = math.prod(left.shape[axis] for axis in dot.numbers('lhs_contracting_dims'))
  return 2.0 * dot.arrays[0].size * summed


def convolution_flops(home: Computation, convolution: Instruction) -> float:
  """Returns the FLOPs of a `convolution`: places of the window in the padding count for nothing.

  A TPU's compiler makes one of every matrix product; batches of products become windows over
  spread-out rows, nearly all of whose places are empty.
  """
  left, right = (home.by_name[name].arrays[0] for name in convolution.operands[:2])
  out = convolution.arrays[0]
  labels = (convolution.attribute('dim_labels') or '').strip()
  match = re.fullmatch(r'(\w+)_(\w+)->(\w+)', labels)
  if match is None:
    raise ValueError(f'convolution {convolution.name}: no dim_labels in {labels!r}')
  lhs, rhs, result = match.groups()
  window = _window(convolution.attribute('window') or '')
  batch_groups = int(convolution.attribute('batch_group_count') or 1)
  flops = 2.0 * out.shape[result.index('f')] * out.shape[result.index('b')]
  # Input features of one group of features; the kernel has only those.
  flops *= right.shape[rhs.index('i')]
  if batch_groups > 1:
    flops *= left.shape[lhs.index('b')] / batch_groups / max(out.shape[result.index('b')], 1)
  for place, digit in enumerate(sorted(set(result) - {'b', 'f'})):
    flops *= _valid_places(
      left.shape[lhs.index(digit)],
      right.shape[rhs.index(digit)],
      out.shape[result.index(digit)],
      {key: values[place] for key, values in window.items() if place < len(values)},
    )
  return flops


def _window(text: str) -> dict[str, list[tuple[int, ...]]]:
  return {
    key: [tuple(map(int, part.split('_'))) for part in values.split('x')]
    for key, values in re.findall(r'(\w+)=([-\dx_]+)', text)
  }


def _valid_places(size: int, window: int, out: int, facts: dict[str, tuple[int, ...]]) -> int:
  """Pairs of an output and a place of the window that fall on an element, along one axis."""
  stride = facts.get('stride', (1,))[0]
  low = facts.get('pad', (0, 0))[0]
  spread, dilate = facts.get('lhs_dilate', (1,))[0], facts.get('rhs_dilate', (1,))[0]
  at = np.arange(out)[:, None] * stride - low + np.arange(window)[None] * dilate
  return int(np.sum((at >= 0) & (at % spread == 0) & (at // spread < size)))


def _moved(module: Module, home: Computation, instruction: Instruction) -> float:
  """Bytes between memory and the core; what lies beside the core already moves nothing."""
  op = instruction.opcode
  written = [array for array in instruction.arrays if array.space == 0]
  if op in ('dynamic-slice', 'slice', 'gather'):
    near = [a for a in home.reads(instruction)[:1] if a.space]
    return sum(a.bytes for a in written) + (0 if near else sum(a.bytes for a in instruction.arrays))
  if op == 'dynamic-update-slice':
    reads = home.reads(instruction)
    return 2.0 * reads[1].bytes if len(reads) > 1 and instruction.arrays[0].space == 0 else 0.0
  if op == 'copy-start':
    # Destination, source, and a token.
    pair = instruction.arrays[:2]
    return float(sum(a.bytes for a in pair if a.space == 0))
  if op == 'fusion':
    body = next(module.inner(instruction, 'calls'), None)
    if body is not None:
      return _fusion_moved(module, home, instruction, body)
  reads = [array for array in home.reads(instruction) if array.space == 0]
  return float(sum(a.bytes for a in written) + sum(a.bytes for a in reads))


def _fusion_moved(
  module: Module, home: Computation, fusion: Instruction, body: Computation
) -> float:
  """Bytes of a fusion: of an operand that it only slices, the slices; in place, the updates."""
  updated, written = _written(body, fusion)
  moved = written
  for number, name in enumerate(fusion.operands):
    source = home.by_name.get(name)
    if source is None or not source.arrays or len(source.arrays) > 1 or source.arrays[0].space:
      continue
    inside = body.parameter(number)
    if inside is None:
      continue
    if inside.name not in updated:
      whole = source.arrays[0].bytes
      moved += min(_read(module, body, inside, whole), whole)
  return moved


def _read(module: Module, body: Computation, value: Instruction, whole: float) -> float:
  """Bytes of a fusion's operand that the fusion reads: slices, wherever in it they are taken."""
  moved = 0.0
  for user in body.instructions:
    if value.name not in user.operands:
      continue
    if user.opcode in _SLICES and user.operands[0] == value.name:
      moved += sum(array.bytes for array in user.arrays)
    elif user.opcode == 'bitcast':
      moved += _read(module, body, user, whole)
    elif user.opcode == 'fusion':
      inner = next(module.inner(user, 'calls'), None)
      parameter = None if inner is None else inner.parameter(user.operands.index(value.name))
      if inner is None or parameter is None:
        return whole
      moved += _read(module, inner, parameter, whole)
    else:
      return whole
  return moved


def _written(body: Computation, fusion: Instruction) -> tuple[set[str], float]:
  """Parameters of a fusion that it updates in place, and the bytes that it writes."""
  root = body.root
  results = [body.by_name.get(n) for n in root.operands] if root.opcode == 'tuple' else [root]
  updated: set[str] = set()
  total = 0.0
  for result, array in zip(results, fusion.arrays):
    inner = _through(body, result)
    if inner is not None and inner.opcode == 'dynamic-update-slice':
      target = _through(body, body.by_name.get(inner.operands[0]))
      if target is not None and target.opcode == 'parameter':
        updated.add(target.name)
      update = body.by_name.get(inner.operands[1])
      total += 0.0 if array.space or update is None else sum(a.bytes for a in update.arrays)
    else:
      total += 0.0 if array.space else array.bytes
  return updated, total


def _through(body: Computation, instruction: Instruction | None) -> Instruction | None:
  while instruction is not None and instruction.opcode in ('bitcast', 'convert', 'copy', 'reshape'):
    instruction = body.by_name.get(instruction.operands[0]) if instruction.operands else None
  return instruction


def array_bytes(arrays: tuple[Array, ...]) -> int:
  """Returns the bytes of arrays."""
  return sum(array.bytes for array in arrays)
