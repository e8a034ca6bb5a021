"""The text half of the override grammar: `Name(key=value)`, numbers, words and tuples.

Nothing is evaluated: the text is parsed to a syntax tree, and every node is read against the
annotation of the field it is for.
"""

import ast
import math
import operator
import warnings
from collections.abc import Callable
from typing import Any

from deepseek_jax.core import annotation as annotations
from deepseek_jax.core.config import did_you_mean
from deepseek_jax.core.draft import (
  FAILED,
  MISSING,
  Items,
  Report,
  become,
  join,
  kind_of,
  open_draft,
)

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
  ast.FloorDiv: operator.floordiv,
  ast.Mod: operator.mod,
  ast.Pow: operator.pow,
}
_SPECIAL_FLOATS = ('inf', '-inf', 'nan')
_BOOLS = {'True': True, 'true': True, 'False': False, 'false': False}
_LARGEST_BITS = 4096  # powers beyond it are slips of the hand, and would take the machine with them


def read(text: str, annotation: Any, current: Any, path: str, report: Report) -> Any:
  """Reads the text of one assignment.

  Args:
    text: as written on the command line, without the shell's quotes.
    annotation: of the field the value is for.
    current: the value in the field now (a config, a draft, MISSING …): where the text names its
      kind, fields that are not given stay.
    path: of the field, for messages.
    report: takes the faults.

  Returns:
    A value, a draft of one, or FAILED.
  """
  members = annotations.expand(annotation)
  if text.strip() in annotations.literals(members):
    return text.strip()
  tree = _parse(text.strip())
  if str not in members:
    if tree is None:
      return _misfit(text, annotation, current, path, report)
    return _Reader(text.strip(), report).read(tree, annotation, current, path)
  # Where text is allowed, whatever reads as nothing else is the text itself: data/*.txt needs no
  # quotes. But a call of a name is meant as a kind wherever there are kinds.
  trial = Report()
  value = _Reader(text.strip(), trial).read(tree, annotation, current, path) if tree else FAILED
  named = annotations.kinds(annotation, kind_of(current)) or annotations.presets(annotation)
  called = isinstance(tree, ast.Call) and bool(named)
  if trial.faults and (called or text.strip() == 'None'):
    report.faults += trial.faults
    return value
  return text if tree is None or trial.faults else value


def _parse(text: str) -> ast.expr | None:
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # '\d' and the like are for the reader to judge
    try:
      return ast.parse(text, mode='eval').body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
      return None


def _misfit(text: str, annotation: Any, current: Any, path: str, report: Report) -> Any:
  expected = annotations.expected(annotation, kind_of(current))
  return report.fault(path, f'{text!r} is not {expected}')


class _Reader:
  """Reads the nodes of one text."""

  def __init__(self, text: str, report: Report):
    self.text = text
    self.report = report

  def read(self, node: ast.expr, annotation: Any, current: Any, path: str) -> Any:
    """The value of a node for a field; FAILED where it does not fit."""
    members = annotations.expand(annotation)
    if isinstance(node, ast.Call):
      return self._call(node, annotation, current, path)
    if isinstance(node, ast.Name):
      return self._name(node, annotation, current, path)
    if isinstance(node, (ast.Tuple, ast.List)):
      return self._tuple(node, annotation, current, path)
    # An interface accepts objects, but a text can only name kinds: `Any` is no wish for a number.
    plain = tuple(member for member in members if not annotations.is_open(member))
    try:
      value = constant(node)
    except ValueError as error:
      reason = f' ({error})' if str(error) else ''
      return self._wrong(node, annotation, current, path, reason)
    fitted = annotations.fit_members(value, plain)
    if fitted is not annotations.MISFIT:
      return fitted
    return self._wrong(node, annotation, current, path, self._hint(node, value, members))

  def _source(self, node: ast.expr) -> str:
    return ast.get_source_segment(self.text, node) or ast.unparse(node)

  def _wrong(self, node: ast.expr, annotation: Any, current: Any, path: str, hint: str = '') -> Any:
    current_kind = kind_of(current)
    members = annotations.expand(annotation)
    if any(annotations.is_open(m) for m in members) and not annotations.kinds(
      annotation, current_kind
    ):
      return self.report.fault(
        path,
        f'{self._source(node)!r} cannot be read for {annotations.spell(annotation)}: no kind is in '
        'scope here; put the object in from Python',
      )
    expected = annotations.expected(annotation, current_kind)
    return self.report.fault(path, f'{self._source(node)!r} is not {expected}{hint}')

  def _hint(self, node: ast.expr, value: Any, members: tuple[Any, ...]) -> str:
    if isinstance(value, float) and int in members and value.is_integer():
      return f'; did you mean {int(value)}?'
    for member in members:
      inner = annotations.elements(member, 1) if annotations.is_tuple(member) else None
      if inner and annotations.fit(value, inner[0]) is not annotations.MISFIT:
        return f'; did you mean ({self._source(node)},)?'
    return ''

  def _name(self, node: ast.Name, annotation: Any, current: Any, path: str) -> Any:
    members = annotations.expand(annotation)
    kinds = annotations.kinds(annotation, kind_of(current))
    if node.id in annotations.literals(members):
      return node.id
    if node.id in annotations.presets(annotation):
      return annotations.presets(annotation)[node.id]
    if node.id in kinds:
      return become(kinds[node.id], current)
    if node.id in _BOOLS and bool in members:
      return _BOOLS[node.id]
    if node.id in _SPECIAL_FLOATS and float in members:
      return float(node.id)
    if str in members:
      return node.id
    return self._unknown(node, annotation, current, path)

  def _unknown(self, node: ast.expr, annotation: Any, current: Any, path: str) -> Any:
    kinds = annotations.kinds(annotation, kind_of(current))
    literals = [str(value) for value in annotations.literals(annotations.expand(annotation))]
    literals += annotations.presets(annotation)
    name = self._source(node)
    if not kinds:
      return self._wrong(node, annotation, current, path, did_you_mean(name, literals))
    expected = annotations.expected(annotation, kind_of(current))
    hint = did_you_mean(name, [*kinds, *literals])
    return self.report.fault(path, f'`{name}` is not {expected}{hint}')

  def _call(self, node: ast.Call, annotation: Any, current: Any, path: str) -> Any:
    kinds = annotations.kinds(annotation, kind_of(current))
    name = self._source(node.func)
    if name == 'float' and float in annotations.expand(annotation):
      special = ast.literal_eval(node.args[0]) if _is_constant_call(node) else None
      if special in _SPECIAL_FLOATS:
        return float(special)
    ready = annotations.presets(annotation).get(name)
    if name not in kinds and not annotations.is_config(ready):
      where = node.func if kinds else node
      return self._unknown(where, annotation, current, path)
    draft = open_draft(ready) if ready is not None else become(kinds[name], current)
    hints = annotations.hints(draft.kind)
    given: dict[str, Any] = {}
    for field, argument, inner in self._arguments(node, draft.kind, path):
      if field in given:
        self.report.fault(inner, f'`{name}` gets `{field}` twice')
      before = draft.values.get(field, MISSING)
      given[field] = self.read(argument, hints[field], before, inner)
    for field, value in given.items():
      draft.give(field, value)
    return draft

  def _arguments(self, node: ast.Call, kind: type, path: str) -> list[tuple[str, ast.expr, str]]:
    """(field, value, path) of each argument that has a field; the others are faults."""
    known = annotations.fields(kind)
    # As Python has it: what may be given by place comes before all that a base wants by name.
    names = sorted(known, key=lambda name: bool(known[name].kw_only))
    found = []
    if len(node.args) > len(names):
      self.report.fault(
        path, f'`{kind.__name__}` has {len(names)} fields, {len(node.args)} values were given'
      )
    for name, argument in zip(names, node.args):
      found.append((name, argument, join(path, name)))
    for keyword in node.keywords:
      if keyword.arg in names:
        found.append((keyword.arg, keyword.value, join(path, keyword.arg)))
      elif keyword.arg is None:
        self.report.fault(path, f'`{self._source(keyword.value)}`: ** cannot be used here')
      else:
        self.report.fault(join(path, keyword.arg), no_field(kind, keyword.arg))
    return found

  def _tuple(self, node: ast.Tuple | ast.List, annotation: Any, current: Any, path: str) -> Any:
    members = [m for m in annotations.expand(annotation) if annotations.is_tuple(m)]
    attempts = []
    for member in members:
      inner = annotations.elements(member, len(node.elts))
      if inner is None:
        continue
      # A tuple written out is new as a whole: its elements take nothing from those before.
      attempt = _Reader(self.text, Report())
      values = [
        attempt.read(part, wanted, MISSING, join(path, index))
        for index, (part, wanted) in enumerate(zip(node.elts, inner))
      ]
      if not attempt.report.faults:
        return Items(values)
      attempts.append((attempt.report.faults, Items(values)))
    if len(attempts) == 1:
      self.report.faults += attempts[0][0]
      return attempts[0][1]
    return self._wrong(node, annotation, current, path)


def no_field(kind: type, name: str) -> str:
  """The message for a name that is no field of a kind."""
  names = list(annotations.fields(kind))
  if isinstance(getattr(kind, name, None), property):
    return f'`{name}` of `{kind.__name__}` is computed from its fields and cannot be set'
  near = did_you_mean(name, names)
  return f'`{kind.__name__}` has no field `{name}`{near or "; it has " + ", ".join(names)}'


def constant(node: ast.expr) -> Any:
  """The value of a constant, or of arithmetic on numbers (`2**20`, `64 * 1024`, `-1e-3`).

  Args:
    node: of a syntax tree.

  Raises:
    ValueError: it is neither; the message is a reason, or empty.
  """
  if isinstance(node, ast.Constant) and not isinstance(node.value, (bytes, complex)):
    return None if node.value is None else node.value
  if isinstance(node, ast.Name) and node.id in _SPECIAL_FLOATS:
    return float(node.id)
  if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
    value = _number(node.operand)
    return -value if isinstance(node.op, ast.USub) else value
  if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
    return _calculate(node, _number(node.left), _number(node.right))
  raise ValueError


def _number(node: ast.expr) -> int | float:
  value = constant(node)
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise ValueError
  return value


def _calculate(node: ast.BinOp, left: int | float, right: int | float) -> int | float:
  whole_power = isinstance(node.op, ast.Pow) and isinstance(left, int) and isinstance(right, int)
  if whole_power and abs(right) * int(left).bit_length() > _LARGEST_BITS:
    raise ValueError('too large')
  try:
    value = _BINARY[type(node.op)](left, right)
  except ArithmeticError as error:
    raise ValueError(str(error)) from error
  if isinstance(value, complex):
    raise ValueError('not a real number')
  if isinstance(value, float) and math.isnan(value) and left == left and right == right:
    raise ValueError('not a number')
  return value


def _is_constant_call(node: ast.Call) -> bool:
  return len(node.args) == 1 and not node.keywords and isinstance(node.args[0], ast.Constant)
