"""Configs as JSON, as Python source and as a digest; all of them hold every field."""

import dataclasses
import hashlib
import importlib
import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from deepseek_jax.core import annotation as annotations
from deepseek_jax.core.config import ConfigError, did_you_mean
from deepseek_jax.core.difference import Change, difference
from deepseek_jax.core.draft import FAILED, Draft, Report, finish, join
from deepseek_jax.core.text import no_field

__all__ = [
  'Change',
  'difference',
  'digest',
  'from_json',
  'namespace',
  'to_json',
  'to_module',
  'to_python',
]

_LINE_LENGTH = 100
_ONE_LINE = -(10**9)  # columns used before a value that must not be broken into lines


def to_json(config: Any) -> dict[str, Any]:
  """A config as data that `json.dumps` writes without loss.

  Every config in it becomes {'kind': 'module:Name', field: value, …}, a tuple becomes a list, and a
  float that JSON has no word for {'kind': 'float', 'value': 'inf'}.

  Args:
    config: a dataclass whose fields hold plain data, tuples and such dataclasses.

  Raises:
    ConfigError: with every field that holds something else.
  """
  if not annotations.is_config(config):
    raise ConfigError(f'{config!r} is not a config')
  report = Report()
  data = _encode(config, '', report)
  if report.faults:
    raise ConfigError(report.faults)
  return data


def _encode(value: Any, path: str, report: Report) -> Any:
  if annotations.is_config(value):
    kind = type(value)
    names = annotations.fields(kind)
    if 'kind' in names:
      return report.fault(join(path, 'kind'), f'`{kind.__name__}` must not call a field `kind`')
    encoded = {name: _encode(getattr(value, name), join(path, name), report) for name in names}
    return {'kind': f'{kind.__module__}:{kind.__qualname__}', **encoded}
  if isinstance(value, tuple):
    return [_encode(part, join(path, index), report) for index, part in enumerate(value)]
  if isinstance(value, float) and not math.isfinite(value):
    return {'kind': 'float', 'value': str(float(value))}
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  return report.fault(
    path, f'an object of {type(value).__name__} cannot be saved; make it a frozen dataclass'
  )


def from_json(data: Mapping[str, Any]) -> Any:
  """The config that `to_json` wrote.

  Fields that are absent take today's defaults, so that old runs stay readable.

  Args:
    data: as `json.loads` returns it.

  Raises:
    ConfigError: with every unknown kind, unknown field, and value that does not fit its field.
  """
  if not isinstance(data, Mapping) or 'kind' not in data:
    raise ConfigError("this is not a saved config: it is no mapping with a 'kind'")
  report = Report()
  config = _decode(data, '', report)
  if report.faults:
    raise ConfigError(report.faults)
  return config


def _decode(data: Any, path: str, report: Report) -> Any:
  if isinstance(data, list):
    parts = tuple(_decode(part, join(path, index), report) for index, part in enumerate(data))
    return FAILED if any(part is FAILED for part in parts) else parts
  if not isinstance(data, Mapping):
    return data
  if data.get('kind') == 'float':
    return float(data['value'])
  try:
    kind = _find_kind(str(data.get('kind')))
  except ConfigError as error:
    return report.fault(path, str(error))
  hints = annotations.hints(kind)
  draft = Draft(kind, {})
  for name, part in data.items():
    if name in hints:
      where = join(path, name)
      draft.values[name] = _checked(_decode(part, where, report), hints[name], where, report)
    elif name != 'kind':
      report.fault(join(path, name), no_field(kind, name))
  for name, field in annotations.fields(kind).items():
    if name not in draft.values and field.default is not dataclasses.MISSING:
      draft.values[name] = field.default
    elif name not in draft.values and field.default_factory is not dataclasses.MISSING:
      draft.values[name] = field.default_factory()
  return finish(draft, path, report)


def _checked(value: Any, annotation: Any, path: str, report: Report) -> Any:
  if value is FAILED or annotations.fit(value, annotation) is not annotations.MISFIT:
    return value
  return report.fault(path, f'{value!r} is not {annotations.expected(annotation)}')


def _find_kind(name: str) -> type:
  module_name, _, qualified = name.partition(':')
  if not module_name or not qualified:
    raise ConfigError(f'`{name}` does not name a kind; expected `module:Name`')
  try:
    found: Any = importlib.import_module(module_name)
  except ImportError as error:
    raise ConfigError(f'`{name}` is not known here: {error}') from error
  for part in qualified.split('.'):
    names = [n for n, value in vars(found).items() if isinstance(value, type)]
    if part not in names:
      near = did_you_mean(part, names)
      raise ConfigError(f'`{module_name}` has no kind `{qualified}`{near}')
    found = vars(found)[part]
  if not isinstance(found, type) or not dataclasses.is_dataclass(found):
    raise ConfigError(f'`{name}` is not a dataclass')
  return found


def to_python(config: Any) -> str:
  """A config as a Python expression that builds it, with every field named.

  `eval(to_python(config), namespace(config))` gives an equal config.

  Args:
    config: a dataclass. Objects in it that are neither dataclasses nor plain data appear as their
      `repr`.
  """
  return _spell(config, _names(config), 0, 0)


def namespace(config: Any) -> dict[str, Any]:
  """The names that `to_python(config)` uses, and what they stand for."""
  found: dict[str, Any] = {}
  for kind, name in _names(config).items():
    root = name.split('.')[0]
    if name == kind.__name__:
      found[root] = kind
    elif name == _written(kind):
      found[root] = getattr(sys.modules[kind.__module__], root)
    else:
      found[root] = importlib.import_module(root)
  return found


def to_module(config: Any) -> str:
  """A Python file whose `get_config()` returns the config: a run that can be repeated.

  Args:
    config: a dataclass whose kinds live in modules that can be imported.
  """
  imports = set()
  for kind, name in _names(config).items():
    if name == _written(kind):
      imports.add(f'from {kind.__module__} import {name.split(".")[0]}')
    else:
      imports.add(f'import {kind.__module__}')
  body = _spell(config, _names(config), 2, len('return '))
  lines = '\n'.join(sorted(imports))
  result = _names(config)[type(config)]
  return f'{lines}\n\n\ndef get_config() -> {result}:\n  return {body}\n'


def _names(config: Any) -> dict[type, str]:
  """How each kind in a config is written: in full where two share a name."""
  found: list[type] = []
  _collect(config, found)
  roots: dict[str, set[tuple[str, str]]] = {}
  for kind in found:
    root = _written(kind).split('.')[0]
    roots.setdefault(root, set()).add((kind.__module__, root))
  names = {}
  for kind in found:
    shared = len(roots[_written(kind).split('.')[0]]) > 1
    names[kind] = f'{kind.__module__}.{_written(kind)}' if shared else _written(kind)
  return names


def _written(kind: type) -> str:
  # A class made in a function has '<locals>' in its name, which is no Python.
  return kind.__qualname__.rpartition('<locals>.')[2]


def _collect(value: Any, found: list[type]) -> None:
  if annotations.is_config(value):
    if type(value) not in found:
      found.append(type(value))
    for name in annotations.fields(type(value)):
      _collect(getattr(value, name), found)
  elif isinstance(value, tuple):
    for part in value:
      _collect(part, found)


def _spell(value: Any, names: dict[type, str], indent: int, used: int) -> str:
  """Python for a value: on one line if it fits, else one part a line.

  Args:
    value: a config, a tuple or plain data.
    names: of the kinds.
    indent: columns in front of the line the value begins on.
    used: columns on that line before the value.
  """
  if annotations.is_config(value):
    start, end = f'{names[type(value)]}(', ')'
    parts = [(f'{n}=', getattr(value, n)) for n in annotations.fields(type(value))]
  elif isinstance(value, tuple):
    start, end = '(', ')'
    parts = [('', part) for part in value]
  elif isinstance(value, float) and not math.isfinite(value):
    return f"float('{float(value)}')"
  else:
    return repr(value)
  flat = [prefix + _spell(part, names, 0, _ONE_LINE) for prefix, part in parts]
  comma = ',' if isinstance(value, tuple) and len(parts) == 1 else ''
  line = f'{start}{", ".join(flat)}{comma}{end}'
  if not parts or indent + used + len(line) + 1 <= _LINE_LENGTH:
    return line
  inner = indent + 2
  lines = [
    f'{" " * inner}{prefix}{_spell(part, names, inner, len(prefix))},' for prefix, part in parts
  ]
  return '\n'.join([start, *lines, ' ' * indent + end])


def digest(config: Any) -> str:
  """A short name of a config's content: equal configs share it, on every machine.

  Args:
    config: as for `to_json`.

  Returns:
    12 hexadecimal digits.

  Raises:
    ConfigError: the config holds something that cannot be saved.
  """
  text = json.dumps(_canonical(to_json(config)), sort_keys=True, allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def _canonical(data: Any) -> Any:
  if isinstance(data, dict):
    return {name: _canonical(part) for name, part in data.items()}
  if isinstance(data, list):
    return [_canonical(part) for part in data]
  # 1 == 1.0 makes two configs equal, so it must not make their digests differ.
  return int(data) if isinstance(data, float) and data.is_integer() else data
