"""Objects on their way: fields are gathered in drafts, and each object is built exactly once.

A frozen config validates itself when it is built. If assignments were applied one by one, an object
could be refused half-way (experts=4 before top_k=2); a draft is built when all of them are in.
"""

import dataclasses
from typing import Any

from deepseek_jax.core import annotation as annotations
from deepseek_jax.core.config import ConfigError


class _Mark:
  """A value that stands for no value."""

  def __init__(self, name: str):
    self.name = name

  def __repr__(self) -> str:
    return self.name


FAILED = _Mark('FAILED')  # a value that could not be made; the report says why
MISSING = _Mark('MISSING')  # a field without a value so far


def join(path: str, name: str | int) -> str:
  """A dotted path, one step longer."""
  return f'{path}.{name}' if path else str(name)


@dataclasses.dataclass
class Report:
  """What is found on the way.

  Attributes:
    faults: error messages, each with its path in front.
    changes: (carried, defaulted) names of fields, for the path of every object whose kind changed.
  """

  faults: list[str] = dataclasses.field(default_factory=list)
  changes: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = dataclasses.field(
    default_factory=dict
  )

  def fault(self, path: str, message: str) -> Any:
    """Notes a fault and returns FAILED, to be put where the value would have gone."""
    self.faults.append(f'{path}: {message}' if path else message)
    return FAILED


@dataclasses.dataclass
class Draft:
  """An object that is not built yet.

  Attributes:
    kind: the dataclass it will be.
    values: values of its fields, themselves drafts perhaps; required fields may be absent.
    origin: the object it is a changed copy of, or None when the kind changed.
    carried: fields taken over from an object of another kind.
    defaulted: fields that got the kind's own default because of a change of kind.
  """

  kind: type
  values: dict[str, Any]
  origin: Any = None
  carried: list[str] = dataclasses.field(default_factory=list)
  defaulted: list[str] = dataclasses.field(default_factory=list)

  def give(self, name: str, value: Any) -> None:
    """Sets a field to what the caller asked for."""
    self.values[name] = value
    self.carried = [other for other in self.carried if other != name]
    self.defaulted = [other for other in self.defaulted if other != name]


@dataclasses.dataclass
class Items:
  """A tuple that is not built yet: elements may be drafts."""

  values: list[Any]


def kind_of(value: Any) -> type | None:
  """The kind of a config or of a draft; None for everything else."""
  if isinstance(value, Draft):
    return value.kind
  return type(value) if annotations.is_config(value) and not isinstance(value, Items) else None


def open_draft(value: Any) -> Draft:
  """A draft that changes nothing yet, of a config or of what is a draft already."""
  if isinstance(value, Draft):
    return value
  names = annotations.fields(type(value))
  return Draft(type(value), {name: getattr(value, name) for name in names}, origin=value)


def become(kind: type, current: Any) -> Draft:
  """A draft of another kind in the place of the current value.

  Fields of the same name and type keep their value, the others get the new kind's defaults.

  Args:
    kind: the dataclass that is wanted.
    current: the config, the draft or the plain value that is there now.

  Returns:
    The draft; the current value's own draft when it is of that kind already.
  """
  old_kind = kind_of(current)
  if old_kind is kind:
    return open_draft(current)
  draft = Draft(kind, {})
  old = open_draft(current).values if old_kind else {}
  old_hints = annotations.hints(old_kind) if old_kind else {}
  for name, field in annotations.fields(kind).items():
    if name in old and _same_type(old_hints[name], annotations.hints(kind)[name]):
      draft.values[name] = old[name]
      draft.carried.append(name)
    elif field.default is not dataclasses.MISSING:
      draft.values[name] = field.default
      draft.defaulted.append(name)
    elif field.default_factory is not dataclasses.MISSING:
      draft.values[name] = field.default_factory()
      draft.defaulted.append(name)
  return draft


def _same_type(old: Any, new: Any) -> bool:
  # A value of `int` is also one of `int | None`; a count never becomes a fraction.
  return set(annotations.expand(old)) <= set(annotations.expand(new))


def finish(value: Any, path: str, report: Report) -> Any:
  """Builds a draft and everything in it, from the inside out.

  Args:
    value: a draft, or a value that needs no building.
    path: where it belongs, for messages.
    report: takes the faults, and what each change of kind carried over.

  Returns:
    The object, or FAILED; the unchanged original where nothing is different.
  """
  if isinstance(value, Items):
    parts = [finish(part, join(path, index), report) for index, part in enumerate(value.values)]
    return FAILED if any(part is FAILED for part in parts) else tuple(parts)
  if not isinstance(value, Draft):
    return value
  values = {name: finish(part, join(path, name), report) for name, part in value.values.items()}
  absent = [name for name in annotations.fields(value.kind) if name not in values]
  if absent:
    names = ', '.join(f'`{name}`' for name in absent)
    report.fault(path, f'`{value.kind.__name__}` needs a value for {names}')
  if absent or any(part is FAILED for part in values.values()):
    return FAILED
  if value.origin is None:
    report.changes[path] = (tuple(value.carried), tuple(value.defaulted))
  return _build(value, values, path, report)


def _build(draft: Draft, values: dict[str, Any], path: str, report: Report) -> Any:
  try:
    if draft.origin is None:
      return draft.kind(**values)
    changed = {n: part for n, part in values.items() if part is not getattr(draft.origin, n)}
    return dataclasses.replace(draft.origin, **changed) if changed else draft.origin
  except ConfigError as error:
    for message in error.messages:
      report.fault(path, message)
  except (TypeError, ValueError) as error:
    report.fault(path, f'{type(error).__name__}: {error}')
  return FAILED
