"""What is different between two configs, path by path."""

import dataclasses
from typing import Any

from deepseek_jax.core import annotation as annotations
from deepseek_jax.core.draft import join


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
  """One place where two configs differ.

  Attributes:
    path: dotted path of the field.
    old: its value in the first config.
    new: its value in the second; a whole config where the kind changed.
    carried: where the kind changed, the fields of `new` that kept the value they had in `old`.
    defaulted: where the kind changed, the fields of `new` that hold the kind's own default.
  """

  path: str
  old: Any
  new: Any
  carried: tuple[str, ...] = ()
  defaulted: tuple[str, ...] = ()

  def __str__(self) -> str:
    """`model.depth: 6 → 4`, with what a change of kind carried over and what it reset."""
    text = f'{self.path}: {self.old!r} → {self.new!r}'
    notes = []
    if self.carried:
      notes.append(f'kept {", ".join(self.carried)}')
    if self.defaulted:
      notes.append(f'default {", ".join(self.defaulted)}')
    return f'{text} ({"; ".join(notes)})' if notes else text


def difference(old: Any, new: Any) -> list[Change]:
  """Every place where two configs differ.

  Args:
    old: a config.
    new: another, of the same kind or not.

  Returns:
    One change for every field that differs, in the order of the fields. Where the kind itself
    differs, or the length of a tuple, there is one change for the whole of it.
  """
  return _compare(old, new, '')


def _compare(old: Any, new: Any, path: str) -> list[Change]:
  if old is new:
    return []
  if annotations.is_config(old) and annotations.is_config(new):
    if type(old) is not type(new):
      carried, defaulted = _origins(old, new)
      return [Change(path=path, old=old, new=new, carried=carried, defaulted=defaulted)]
    found = []
    for name in annotations.fields(type(old)):
      found += _compare(getattr(old, name), getattr(new, name), join(path, name))
    return found
  if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
    found = []
    for index, (before, after) in enumerate(zip(old, new)):
      found += _compare(before, after, join(path, index))
    return found
  return [] if _equal(old, new) else [Change(path=path, old=old, new=new)]


def _equal(old: Any, new: Any) -> bool:
  if isinstance(old, float) and isinstance(new, float) and old != old and new != new:
    return True  # nan is the same setting as nan
  if isinstance(old, bool) is not isinstance(new, bool):
    return False  # True == 1, but they are not the same setting
  return bool(old == new)


def _origins(old: Any, new: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
  carried, defaulted = [], []
  old_names = annotations.fields(type(old))
  for name, field in annotations.fields(type(new)).items():
    value = getattr(new, name)
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
      default = field.default_factory()
    if name in old_names and not _compare(getattr(old, name), value, ''):
      carried.append(name)
    elif default is not dataclasses.MISSING and not _compare(default, value, ''):
      defaulted.append(name)
  return tuple(carried), tuple(defaulted)
