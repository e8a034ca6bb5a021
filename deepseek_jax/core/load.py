"""Reads a run's config from a Python file."""

import dataclasses
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from deepseek_jax.core.config import ConfigError, did_you_mean


def load_config(path: str | Path, function: str = 'get_config') -> Any:
  """Runs a config file and returns what its function gives.

  Args:
    path: of a .py file; a bare name such as `quickstart` means configs/quickstart.py.
    function: the function in the file that returns the config; it takes no arguments.

  Raises:
    ConfigError: there is no such file or function, the file fails (with the line where it does), or
      what it returns is no dataclass.
  """
  file = _find(Path(path))
  config = call_function(load_module(file), function, file)
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


def call_function(module: ModuleType, function: str, file: Path) -> Any:
  """Calls a function of a module that `load_module` returned.

  Args:
    module: the module.
    function: name of a function without arguments.
    file: where the module is from.

  Raises:
    ConfigError: there is no such function, or it fails (with the line where it does).
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
  return _call(found, file)


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
