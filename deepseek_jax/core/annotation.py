"""Field annotations as data: what a field accepts, how it is spelt, and values fitted to it."""

import dataclasses
import functools
import inspect
import numbers
import types
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np

from deepseek_jax.core.config import ConfigError

NoneType = type(None)

# Annotations whose values are plain data; every other class is an interface, open to any object.
_BASIC = (bool, int, float, str, NoneType)


class _Misfit:
  """The answer of `fit` when a value does not fit."""

  def __repr__(self) -> str:
    return 'MISFIT'


MISFIT = _Misfit()


class Presets:
  """Names for ready-made objects of a field: `Annotated[Rules, Presets(FSDP=FSDP, TENSOR=TENSOR)]`.

  Attributes:
    objects: the objects by the names that a text may use for them.
  """

  def __init__(self, **objects: Any):
    """Keeps the objects under their names."""
    self.objects = objects


def is_config(value: object) -> bool:
  """Whether a value is an instance of a dataclass (a dataclass itself is not)."""
  return dataclasses.is_dataclass(value) and not isinstance(value, type)


def fields(kind: type) -> dict[str, dataclasses.Field]:
  """The fields a kind is built from, by name, in declaration order."""
  return {field.name: field for field in dataclasses.fields(kind) if field.init}


@functools.cache
def hints(kind: type) -> dict[str, Any]:
  """The annotation of each field of a kind, with annotations written as text resolved.

  Raises:
    ConfigError: an annotation names something that its module does not have.
  """
  try:
    found = typing.get_type_hints(kind, include_extras=True)
  except NameError as error:
    raise ConfigError(
      f'the annotations of `{kind.__name__}` cannot be read: {error}; import it at the top of '
      f'{kind.__module__}'
    ) from error
  return {name: found[name] for name in fields(kind)}


def expand(annotation: Any) -> tuple[Any, ...]:
  """The alternatives of an annotation: unions, aliases and `Annotated` are opened up.

  Args:
    annotation: anything that may follow the colon of a field.

  Returns:
    Plain classes, `tuple[…]`, `Literal[…]` and `Any`, in the order written.
  """
  found = (member for member in _alternatives(annotation) if not isinstance(member, Presets))
  return tuple(dict.fromkeys(found))


def presets(annotation: Any) -> dict[str, Any]:
  """The ready-made objects that an annotation names."""
  found: dict[str, Any] = {}
  for member in _alternatives(annotation):
    if isinstance(member, Presets):
      found.update(member.objects)
  return found


def _alternatives(annotation: Any) -> Iterator[Any]:
  origin = typing.get_origin(annotation)
  if annotation is None:
    yield NoneType
  elif isinstance(annotation, typing.TypeAliasType):
    yield from _alternatives(annotation.__value__)
  elif isinstance(origin, typing.TypeAliasType):
    yield from _alternatives(origin.__value__[typing.get_args(annotation)])
  elif origin in (typing.Annotated, typing.Final):
    member, *notes = typing.get_args(annotation)
    yield from _alternatives(member)
    yield from (note for note in notes if isinstance(note, Presets))
  elif origin in (typing.Union, types.UnionType):
    for member in typing.get_args(annotation):
      yield from _alternatives(member)
  elif isinstance(annotation, typing.NewType):
    yield from _alternatives(annotation.__supertype__)
  elif isinstance(origin, type) and origin is not tuple and dataclasses.is_dataclass(origin):
    yield origin
  else:
    yield Any if annotation is object else annotation


def literals(members: tuple[Any, ...]) -> tuple[Any, ...]:
  """The values that the `Literal[…]` among the members allow."""
  return tuple(
    value
    for member in members
    if typing.get_origin(member) is typing.Literal
    for value in typing.get_args(member)
  )


def is_tuple(member: Any) -> bool:
  """Whether a member is `tuple` or `tuple[…]`."""
  return member is tuple or typing.get_origin(member) is tuple


def is_open(member: Any) -> bool:
  """Whether a member is an interface (a class, a protocol, `Any`) rather than plain data."""
  return not (member in _BASIC or is_tuple(member) or typing.get_origin(member) is typing.Literal)


def elements(member: Any, length: int) -> tuple[Any, ...] | None:
  """The annotation of each element of a tuple.

  Args:
    member: `tuple`, `tuple[X, ...]` or `tuple[X, Y]`.
    length: how many elements the tuple has.

  Returns:
    One annotation an element, or None where a tuple of that length does not fit.
  """
  arguments = typing.get_args(member)
  if member is tuple:
    return (Any,) * length
  if len(arguments) == 2 and arguments[1] is Ellipsis:
    return (arguments[0],) * length
  return arguments if len(arguments) == length else None


def kinds(annotation: Any, current: type | None = None) -> dict[str, type]:
  """The kinds that a text may name in a field: its registry.

  These are the dataclasses of the annotation, then the dataclasses derived from a class of the
  annotation, and the kind that is in the field now, whether it is registered or not.

  Args:
    annotation: the field's annotation.
    current: the kind in the field now, if any.
  """
  members = [member for member in expand(annotation) if isinstance(member, type)]
  found = {member.__name__: member for member in members if _is_kind(member)}
  for member in members:
    if is_open(member):
      # The latest definition wins: a notebook cell that runs twice leaves its first class behind.
      for kind in reversed([*_descendants(member)]):
        if _is_kind(kind):
          found.setdefault(kind.__name__, kind)
  if current is not None:
    found[current.__name__] = current
  return found


def _is_kind(kind: type) -> bool:
  return dataclasses.is_dataclass(kind) and not inspect.isabstract(kind)


def _descendants(kind: type) -> Iterator[type]:
  child: type
  for child in kind.__subclasses__():
    yield child
    yield from _descendants(child)


def spell(annotation: Any) -> str:
  """An annotation as a reader would write it: `int | None`, `tuple[int, ...]`."""
  return ' | '.join(_spell_member(member) for member in expand(annotation))


def _spell_member(member: Any) -> str:
  if member is NoneType:
    return 'None'
  if member is Ellipsis:
    return '...'
  if typing.get_origin(member) is tuple:
    inner = ['...' if part is Ellipsis else spell(part) for part in typing.get_args(member)] or [
      '()'
    ]
    return f'tuple[{", ".join(inner)}]'
  if typing.get_origin(member) is typing.Literal:
    return ' | '.join(repr(value) for value in typing.get_args(member))
  if isinstance(member, type):
    return member.__name__
  return str(member).removeprefix('typing.')


def expected(annotation: Any, current: type | None = None) -> str:
  """What a field takes, as the end of the sentence 'x is not …'.

  Args:
    annotation: the field's annotation.
    current: the kind in the field now, if any.

  Returns:
    `one of [MLA, Window, None]` where there is a choice of kinds or literals, else `int | None`.
  """
  members = expand(annotation)
  named = kinds(annotation, current)
  ready = presets(annotation)
  if not named and not ready and not literals(members):
    return spell(annotation)
  plain: list[str] = []
  for member in members:
    if typing.get_origin(member) is typing.Literal:
      plain += [repr(value) for value in typing.get_args(member)]
    elif not is_open(member):
      plain.append(_spell_member(member))
  return f'one of [{", ".join([*ready, *named, *plain])}]'


def fit(value: Any, annotation: Any) -> Any:
  """A value in the exact type its field asks for, or MISFIT.

  Numbers become plain `int` and `float` (NumPy's too; an int fits a float field, never the other
  way round, and a bool is no number), lists become tuples. Objects other than plain data fit every
  field that names a class: whoever obeys the interface need not be registered.

  Args:
    value: anything.
    annotation: the field's annotation.
  """
  return fit_members(value, expand(annotation))


def fit_members(value: Any, members: tuple[Any, ...]) -> Any:
  """As `fit`, for an annotation that is expanded already."""
  if Any in members:
    return value
  if any(type(value) is type(choice) and value == choice for choice in literals(members)):
    return value
  if value is None:
    return None if NoneType in members else MISFIT
  if isinstance(value, (bool, np.bool_)):
    return bool(value) if bool in members else MISFIT
  if isinstance(value, numbers.Real):
    return _fit_number(value, members)
  if isinstance(value, str):
    return str(value) if str in members else MISFIT
  if isinstance(value, (tuple, list)):
    fitted = (_fit_tuple(value, member) for member in members if is_tuple(member))
    return next((found for found in fitted if found is not MISFIT), MISFIT)
  return value if any(is_open(member) for member in members) else MISFIT


def _fit_number(value: numbers.Real, members: tuple[Any, ...]) -> Any:
  if isinstance(value, numbers.Integral) and int in members:
    return int(value)
  return float(value) if float in members else MISFIT


def _fit_tuple(value: tuple | list, member: Any) -> Any:
  inner = elements(member, len(value))
  if inner is None:
    return MISFIT
  fitted = tuple(fit(part, annotation) for part, annotation in zip(value, inner))
  return MISFIT if any(part is MISFIT for part in fitted) else fitted
