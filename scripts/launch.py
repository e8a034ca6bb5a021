"""What every script does around its own work: flags, configs, clear errors, exit codes."""

import os
import pathlib
import sys
from collections.abc import Callable

from absl import app, flags, logging

from deepseek_jax.core.arguments import peel
from deepseek_jax.core.config import ConfigError


def cache_dir(given: str | None) -> pathlib.Path:
  """Returns the folder for tokens and pack plans: the one given, or one in the user's cache."""
  if given:
    return pathlib.Path(given)
  environ = os.environ
  base = environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(environ.get('DEEPSEEK_JAX_CACHE') or pathlib.Path(base) / 'deepseek_jax')


def run(main: Callable[[], int | None], usage: str) -> None:
  """Runs a script without `--config` overrides; a `ConfigError` is one message and exit code 2."""
  run_with_config(lambda path, assignments: main(), usage)


def run_with_config(main: Callable[[str | None, dict[str, str]], int | None], usage: str) -> None:
  """Runs `main(config path, overrides)` after taking `--config…` off the command line.

  Args:
    main: returns the exit code, None for 0.
    usage: the script's help.
  """
  found: list[tuple[str | None, dict[str, str]]] = []

  def parse(argv: list[str]) -> list[str]:
    try:
      rest, assignments, path = peel(argv)
      if any(word in ('-h', '--help', '-help') for word in rest[1:]):
        sys.stdout.write(usage.strip() + '\n')
        sys.exit(0)
      left = flags.FLAGS(rest)
      if left[1:]:
        raise ConfigError(f'unexpected argument {left[1]!r}; see --help')
    except (ConfigError, flags.Error) as error:
      _fail(error)
    found.append((path, assignments))
    return left

  def guarded(_: list[str]) -> int | None:
    # JAX tells at INFO of every backend that is not there.
    logging.set_verbosity(logging.WARNING)
    try:
      return main(*found[0])
    except ConfigError as error:
      _fail(error)
    except BrokenPipeError:
      return 0
    return None

  app.run(guarded, flags_parser=parse)


def _fail(error: Exception) -> None:
  print(f'error: {error}', file=sys.stderr)
  sys.exit(2)
