"""Finds what a value was traced from where the compiler has left no name on it."""

import functools

from deepseek_jax.pods.hlo import Computation, Instruction, Module

_PLAIN = frozenset({
  'copy', 'bitcast', 'convert', 'copy-start', 'copy-done', 'reshape', 'transpose',
  'optimization-barrier', 'opt-barrier',
})  # fmt: skip
_LONGEST = 12
"""Steps that are followed before giving up."""


class Origins:
  """Names of a module's values.

  A value that a loop carries has the name of what makes it in the loop's body, or else of what it
  was before the loop; a copy that of what it copies; what has none, that of its first reader.
  """

  def __init__(self, module: Module):
    """Keeps the module, and which loop runs which computation."""
    self.module = module
    self.homes = {i.name: c for c in module.computations.values() for i in c.instructions}
    self.loops: dict[str, Instruction] = {}
    for home in module.computations.values():
      for i in home.instructions:
        if i.opcode == 'while' and (body := i.called.get('body')) is not None:
          self.loops[body] = i

  @functools.cache  # noqa: B019
  def label(self, name: str, place: int = 0) -> str:
    """Returns what a value was traced from: scopes and a primitive, or an argument's name.

    Args:
      name: of an instruction.
      place: of an array in its tuple.
    """
    home = self.homes.get(name)
    if home is None:
      return ''
    found = self._follow(home, home.by_name[name], place, _LONGEST)
    return found or self._reader(home, name)

  def _follow(self, home: Computation, i: Instruction, place: int, steps: int) -> str:
    if steps == 0:
      return ''
    if i.opcode == 'get-tuple-element':
      return self._operand(home, i, int(i.attribute('index') or 0), steps)
    if i.opcode == 'while':
      return self._carried(home, i, place, steps)
    if i.opcode == 'parameter' and home.name in self.loops:
      loop = self.loops[home.name]
      return self._carried(self.homes[loop.name], loop, place, steps)
    if '/' in i.op_name or (i.opcode == 'parameter' and i.op_name):
      return i.op_name
    if i.opcode in _PLAIN:
      return self._operand(home, i, 0, steps)
    return ''

  def _operand(self, home: Computation, i: Instruction, place: int, steps: int) -> str:
    operand = home.by_name.get(i.operands[0]) if i.operands else None
    return '' if operand is None else self._follow(home, operand, place, steps - 1)

  def _carried(self, home: Computation, loop: Instruction, place: int, steps: int) -> str:
    """The name of what a loop carries at one place of its tuple."""
    body = self.module.computations.get(loop.called.get('body', ''))
    if body is not None and body.root.opcode == 'tuple' and place < len(body.root.operands):
      made = body.by_name.get(body.root.operands[place])
      if made is not None and not self._passes(body, made):
        return self._follow(body, made, 0, steps - 1)
    start = home.by_name.get(loop.operands[0])
    if start is None or start.opcode != 'tuple' or place >= len(start.operands):
      return ''
    first = home.by_name.get(start.operands[place])
    return '' if first is None else self._follow(home, first, 0, steps - 1)

  def _passes(self, body: Computation, made: Instruction) -> bool:
    """Whether a value of a body's result is what came in."""
    if made.opcode != 'get-tuple-element':
      return False
    source = body.by_name.get(made.operands[0])
    return source is not None and source.opcode == 'parameter'

  def _reader(self, home: Computation, name: str) -> str:
    for i in home.instructions:
      if name in i.operands and '/' in i.op_name:
        return i.op_name
    return ''
