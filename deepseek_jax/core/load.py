"""Reads a run's config from a Python file."""

import ast
import dataclasses
import functools
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from deepseek_jax.core.config import ConfigError, did_you_mean
from deepseek_jax.core.draft import MISSING, Report, finish
from deepseek_jax.core.text import read


def load_config(path: str | Path, function: str = 'get_config') -> Any:
  """Runs a config file and returns what its function gives.

  Args:
    path: of a .py file; a bare name such as `quickstart` means configs/quickstart.py. Arguments of
      the function may follow: `ladder(depth=4)`.
    function: the function in the file that returns the config.

  Raises:
    ConfigError: there is no such file or function, the function takes no such argument, the file
      fails (with the line where it does), or what it returns is no dataclass.
  """
  name, arguments = _split(str(path))
  file = _find(Path(name))
  config = call_function(load_module(file), function, file, arguments)
  if not dataclasses.is_dataclass(config) or isinstance(config, type):
    raise ConfigError(f'`{function}` in {file} returns {config!r}, which is not a config')
  return config


def load_module(file: Path, name: str | None = None) -> ModuleType:
  """Runs a Python file and returns it as a module.

  Args:
    file: the file.
    name: of the module; None makes one up that belongs to this file alone.

  Raises:
    ConfigError: there is no such file, or it fails (with the line where it does).
  """
  if not file.is_file():
    raise ConfigError(f'there is no file {file}')
  return _execute(file, name or _module_name(file))


def call_function(
  module: ModuleType, function: str, file: Path, arguments: Mapping[str, str] | None = None
) -> Any:
  """Calls a function of a module that `load_module` returned.

  Args:
    module: the module.
    function: its name.
    file: where the module is from.
    arguments: name → text, in the grammar of overrides; parameters must be annotated.

  Raises:
    ConfigError: there is no such function, it takes no such arguments (all are listed), or it fails
      (with the line where it does).
  """
  found = getattr(module, function, None)
  if not callable(found):
    names = [
      name
      for name, value in vars(module).items()
      if callable(value) and getattr(value, '__module__', None) == module.__name__
    ]
    has = f'; it has {", ".join(names)}' if names else ''
    raise ConfigError(f'{file} has no function `{function}`{did_you_mean(function, names) or has}')
  given = _read_arguments(found, arguments, file) if arguments else {}
  return _call(functools.partial(found, **given), file)


def _split(text: str) -> tuple[str, dict[str, str]]:
  """Takes `name(key=value, …)` apart; values stay text."""
  name, bracket, _ = text.partition('(')
  if not bracket or Path(text).is_file():
    return text, {}
  source = f'f{text[len(name) :]}'
  try:
    call = ast.parse(source, mode='eval').body
    if not isinstance(call, ast.Call) or call.args or None in {word.arg for word in call.keywords}:
      raise ValueError('no call by keyword')
  except (SyntaxError, ValueError) as error:
    raise ConfigError(
      f'config {text}: expected the file and arguments by name, such as ladder(depth=4)'
    ) from error
  values = {str(word.arg): ast.get_source_segment(source, word.value) for word in call.keywords}
  return name, {key: value or '' for key, value in values.items()}


def _read_arguments(function: Any, arguments: Mapping[str, str], file: Path) -> dict[str, Any]:
  """Reads arguments by the parameters' annotations, as `--config.path=value` reads fields."""
  try:
    known = inspect.signature(function, eval_str=True).parameters
  except (Exception, SystemExit) as error:
    raise _failure(error, file) from error
  where, report, given = f'`{function.__name__}` in {file}', Report(), {}
  for name, text in arguments.items():
    if name not in known:
      near = did_you_mean(name, known) or f'; it takes {", ".join(known) or "none"}'
      report.fault('', f'{where} takes no argument `{name}`{near}')
      continue
    path = f'{where}: {name}'
    given[name] = finish(read(text, known[name].annotation, MISSING, path, report), path, report)
  if report.faults:
    raise ConfigError(report.faults)
  return given


def _find(path: Path) -> Path:
  candidates = [path]
  if path.suffix != '.py':
    candidates += [path.with_name(path.name + '.py')]
    if path.parent == Path('.'):
      candidates += [Path('configs') / (path.name + '.py')]
  for candidate in candidates:
    if candidate.is_file():
      return candidate
  folders = list(dict.fromkeys(candidate.parent for candidate in candidates))
  there = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob('*.py'))]
  files = {file.stem: file for file in there if not file.stem.startswith('_')}
  near = did_you_mean(path.stem, files)
  for name, file in files.items():
    near = near.replace(f'`{name}`', f'`{file}`')
  missing = [str(folder) for folder in folders if not folder.is_dir()]
  if not near and missing == [str(folder) for folder in folders]:
    near = f'; there is no folder {missing[0]}'
  raise ConfigError(f'there is no config file {path}{near}')


def _execute(file: Path, name: str) -> ModuleType:
  spec = importlib.util.spec_from_file_location(name, file)
  if spec is None or spec.loader is None:
    raise ConfigError(f'{file} is not a Python file')
  module = importlib.util.module_from_spec(spec)
  # Annotations written as text are looked up in the module of the class, by its name.
  before = sys.modules.get(name)
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
  except (Exception, SystemExit) as error:
    if before is None:
      del sys.modules[name]
    else:
      sys.modules[name] = before
    raise _failure(error, file) from error
  return module


def _module_name(file: Path) -> str:
  """A name that belongs to this file alone, and is the same whenever it is loaded again."""
  stem = f'config_file_{file.stem}'
  name, number = stem, 1
  while name in sys.modules and not _is_of(sys.modules[name], file):
    number += 1
    name = f'{stem}_{number}'
  return name


def _is_of(module: ModuleType, file: Path) -> bool:
  return Path(module.__file__ or '').resolve() == file.resolve()


def _call(get_config: Any, file: Path) -> Any:
  try:
    return get_config()
  except (Exception, SystemExit) as error:
    raise _failure(error, file) from error


def _failure(error: BaseException, file: Path) -> ConfigError:
  if isinstance(error, SyntaxError) and error.filename and Path(error.filename).name == file.name:
    line = error.lineno
    text = error.msg
  else:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file.resolve()]
    line = lines[-1] if lines else None
    text = str(error)
  where = f'{file}:{line}' if line else str(file)
  if isinstance(error, ConfigError):
    return ConfigError([f'{where}: {message}' for message in error.messages])
  return ConfigError(f'{where}: {type(error).__name__}: {" ".join(text.split())}')
