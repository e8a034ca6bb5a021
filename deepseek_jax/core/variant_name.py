"""Names of a sweep's points: what tells them apart, short, unique and fit for a folder."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deepseek_jax.core.annotation import is_config
from deepseek_jax.core.difference import difference

type Part = tuple[str | None, Mapping[str, Any]]
"""A label or None, and `{dotted path: value}`."""

UNCHANGED = 'base'
"""Name of the point that sets nothing."""
_LONGEST = 100
_ABSENT = object()


def name_points(points: Sequence[tuple[Part, ...]]) -> tuple[str, ...]:
  """A name for each point: labels as given, `depth=4,peak_lr=0.003` for what has none.

  Paths that have the same value in all of several points are left out, and of a path as much as
  it takes to tell it from the others. A config is its kind with the fields that tell it from
  others of that kind: `attention=Window-size=64`.

  Args:
    points: the parts of each.
  """
  unlabelled = [
    {path: value for label, values in point if label is None for path, value in values.items()}
    for point in points
  ]
  columns = {
    path: [values.get(path, _ABSENT) for values in unlabelled]
    for path in dict.fromkeys(itertools.chain.from_iterable(unlabelled))
  }
  if len(points) > 1:
    columns = {path: column for path, column in columns.items() if _differs(column)}
  short = shorten(columns)
  names = []
  for point in points:
    words = []
    for label, values in point:
      if label is not None:
        words.append(label)
        continue
      for path, value in values.items():
        if path in columns:
          others = [other for other in columns[path] if other is not _ABSENT]
          words.append(f'{short[path]}={spell(value, others)}')
    names.append(_safe(','.join(words)) or UNCHANGED)
  return _unique(names)


def shorten(paths: Iterable[str]) -> dict[str, str]:
  """The shortest tail of each dotted path that no other path shares.

  Args:
    paths: all different.
  """
  paths = list(paths)
  found = {}
  for path in paths:
    names = path.split('.')
    tails = ('.'.join(names[-count:]) for count in range(1, len(names) + 1))
    found[path] = next(
      (tail for tail in tails if sum(f'.{other}'.endswith(f'.{tail}') for other in paths) == 1),
      path,
    )
  return found


def spell(value: Any, others: Iterable[Any] = ()) -> str:
  """A value in few letters; a config as its kind and what tells it from others of its kind.

  Args:
    value: anything.
    others: values that it is to be told from.
  """
  if is_config(value):
    kind = type(value)
    same = [other for other in others if type(other) is kind]
    paths = dict.fromkeys(c.path for other in same for c in difference(value, other))
    fields = [f'{tail}={spell(_inside(value, path))}' for path, tail in shorten(paths).items()]
    return '-'.join([kind.__name__, *fields])
  if isinstance(value, (tuple, list)):
    return '+'.join(spell(part) for part in value) or 'empty'
  if value is None or isinstance(value, (bool, int, float, str)):
    return str(value)
  return getattr(value, '__name__', type(value).__name__)


def _inside(value: Any, path: str) -> Any:
  for name in path.split('.'):
    value = value[int(name)] if isinstance(value, tuple) else getattr(value, name)
  return value


def _differs(column: Sequence[Any]) -> bool:
  first = column[0]
  return any((value is _ABSENT) is not (first is _ABSENT) for value in column) or any(
    difference(first, value) for value in column
  )


def _safe(name: str) -> str:
  """Keeps what every file system and shell leaves alone."""
  name = re.sub(r'[^A-Za-z0-9._=,+-]+', '_', name).strip('._,-')
  if len(name) <= _LONGEST:
    return name
  return f'{name[: _LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}'


def _unique(names: Sequence[str]) -> tuple[str, ...]:
  """Numbers names that occur again; some file systems take A for a."""
  taken: set[str] = set()
  result = []
  for name in names:
    fresh, number = name, 1
    while fresh.casefold() in taken:
      number += 1
      fresh = f'{name}.{number}'
    taken.add(fresh.casefold())
    result.append(fresh)
  return tuple(result)
