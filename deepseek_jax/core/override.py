"""The one override grammar: dotted path = value, on a tree of frozen configs.

The command line, sweeps and notebooks all come here, so an ablation is written one way:

  override(config, {'model.depth': 4, 'model.attention': Window(size=128)})
  override_from_text(config, {'model.depth': '4', 'model.attention': 'Window(size=128)'})
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from deepseek_jax.core import annotation as annotations
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.difference import Change, difference
from deepseek_jax.core.draft import (
  FAILED,
  MISSING,
  Items,
  Report,
  finish,
  join,
  kind_of,
  open_draft,
)
from deepseek_jax.core.text import no_field, read

type Assignments = Mapping[str, Any] | Iterable[tuple[str, Any]]


def override[C](config: C, assignments: Assignments) -> tuple[C, list[Change]]:
  """A copy of a config with some fields set to given objects.

  All assignments are applied together, whatever their order: outer paths before inner ones, and
  every object is built once, so that its validation never sees it half changed.

  Args:
    config: a frozen dataclass; it is not changed.
    assignments: dotted path → value, as a mapping or as pairs (of equal paths, the last wins).
      Plain values are checked against the field's annotation; any other object is put in as it is
      where the field takes objects. Text for a field that takes kinds but no text is read as
      `override_from_text` would.

  Returns:
    The new config, and what is different in it.

  Raises:
    ConfigError: with all that is wrong with all assignments.
  """
  return _Override(from_text=False).run(config, dict(assignments))


def override_from_text[C](config: C, assignments: Assignments) -> tuple[C, list[Change]]:
  """A copy of a config with some fields set to what a text says.

  `Name(key=value)` builds the kind of that name: fields that are not given keep their value where
  the kind stays the same; where it changes, fields of the same name and type are carried over, and
  the rest get the kind's defaults (`Change.carried`, `Change.defaulted`).

  Args:
    config: a frozen dataclass; it is not changed.
    assignments: dotted path → text, as a mapping or as pairs (of equal paths, the last wins).
      What is not a text is put in as by `override`.

  Returns:
    The new config, and what is different in it.

  Raises:
    ConfigError: with all that is wrong with all assignments.
  """
  return _Override(from_text=True).run(config, dict(assignments))


@dataclasses.dataclass
class _Node:
  """The assignments to one place and to the places in it."""

  value: Any = MISSING
  children: dict[str, '_Node'] = dataclasses.field(default_factory=dict)


class _Override:
  """One run over a tree of assignments."""

  def __init__(self, from_text: bool):
    self.from_text = from_text
    self.report = Report()

  def run(self, config: Any, assignments: dict[str, Any]) -> tuple[Any, list[Change]]:
    """Applies all assignments, or raises all faults."""
    root = self._tree(assignments)
    new = self._descend(config, root, '') if root.children else config
    new = finish(new, '', self.report)
    if self.report.faults:
      raise ConfigError(self.report.faults)
    return new, [self._annotate(change) for change in difference(config, new)]

  def _tree(self, assignments: dict[str, Any]) -> _Node:
    root = _Node()
    for path, value in assignments.items():
      names = [name.strip() for name in path.split('.')]
      if not all(names):
        self.report.fault('', f'{path!r} is not a path; write one like `model.depth`')
        continue
      node = root
      for name in names:
        node = node.children.setdefault(name, _Node())
      node.value = value
    return root

  def _apply(self, value: Any, annotation: Any, node: _Node, path: str) -> Any:
    if node.value is not MISSING:
      value = self._assign(value, annotation, node.value, path)
    if node.children and value is not FAILED:
      value = self._descend(value, node, path, annotation)
    return finish(value, path, self.report)

  def _assign(self, current: Any, annotation: Any, value: Any, path: str) -> Any:
    if isinstance(value, str) and (self.from_text or _names_a_kind(annotation, current)):
      return read(value, annotation, current, path, self.report)
    fitted = annotations.fit(value, annotation)
    if fitted is annotations.MISFIT:
      expected = annotations.expected(annotation, kind_of(current))
      return self.report.fault(path, f'{value!r} is not {expected}')
    return fitted

  def _descend(self, value: Any, node: _Node, path: str, annotation: Any = None) -> Any:
    if isinstance(value, (tuple, Items)):
      return self._descend_tuple(value, node, path, annotation)
    kind = kind_of(value)
    if kind is None:
      first = next(iter(node.children))
      return self.report.fault(join(path, first), _no_inside(value, annotation, path))
    draft = open_draft(value)
    hints = annotations.hints(kind)
    for name, child in node.children.items():
      if name in hints:
        before = draft.values.get(name, MISSING)
        draft.give(name, self._apply(before, hints[name], child, join(path, name)))
      else:
        self.report.fault(join(path, name), no_field(kind, name))
    return draft

  def _descend_tuple(
    self, value: 'tuple | Items', node: _Node, path: str, annotation: Any
  ) -> Items:
    items = Items(list(value.values if isinstance(value, Items) else value))
    inner = _elements(annotation, len(items.values))
    for name, child in node.children.items():
      if name.isdecimal() and int(name) < len(items.values):
        index = int(name)
        where = join(path, index)
        items.values[index] = self._apply(items.values[index], inner[index], child, where)
      else:
        self.report.fault(
          join(path, name), f'{name!r} is not an index; `{path}` has {len(items.values)} elements'
        )
    return items

  def _annotate(self, change: Change) -> Change:
    """Puts into a change what was really carried over, not what merely is the same."""
    if kind_of(change.new) is None:
      return change
    carried: list[str] = []
    defaulted: list[str] = []
    for path, names in self.report.changes.items():
      if path == change.path or path.startswith(change.path + '.'):
        inside = path.removeprefix(change.path).removeprefix('.')
        carried += [join(inside, name) for name in names[0]]
        defaulted += [join(inside, name) for name in names[1]]
    return dataclasses.replace(change, carried=tuple(carried), defaulted=tuple(defaulted))


def _names_a_kind(annotation: Any, current: Any) -> bool:
  members = annotations.expand(annotation)
  takes_text = str in members or any(
    isinstance(choice, str) for choice in annotations.literals(members)
  )
  named = annotations.kinds(annotation, kind_of(current)) or annotations.presets(annotation)
  return bool(named) and not takes_text


def _elements(annotation: Any, length: int) -> tuple[Any, ...]:
  """The annotations of a tuple's elements; `Any` where the field's annotation does not say."""
  for member in annotations.expand(annotation):
    inner = annotations.elements(member, length) if annotations.is_tuple(member) else None
    if inner is not None:
      return inner
  return (Any,) * length


def _no_inside(value: Any, annotation: Any, path: str) -> str:
  if value is None or value is MISSING:
    named = annotations.kinds(annotation)
    offer = f'; set it first, to one of [{", ".join(named)}]' if named else ''
    return f'`{path}` {"is None" if value is None else "has no value yet"}{offer}'
  return f'`{path}` is {type(value).__name__}, which has no fields to set'
