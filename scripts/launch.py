"""What every script does around its own work: flags, configs, clear errors, exit codes."""

import contextlib
import os
import pathlib
import shlex
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging

from deepseek_jax.core.arguments import peel
from deepseek_jax.core.config import ConfigError

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / 'configs'


def cache_dir(given: str | None) -> pathlib.Path:
  """Returns the folder for tokens and pack plans: the one given, or one in the user's cache.

  Raises:
    ConfigError: there is no such folder and it cannot be made.
  """
  environ = os.environ
  base = environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  usual = environ.get('DEEPSEEK_JAX_CACHE') or pathlib.Path(base) / 'deepseek_jax'
  folder = pathlib.Path(given or usual)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(f'--cache_dir {folder}: {error.strerror}; expected a folder') from error
  return folder


def load_experiment(config_path: str) -> Any:
  """Returns the `Experiment` that a config file gives.

  Raises:
    ConfigError: the file gives none.
  """
  from deepseek_jax.core.load import load_config
  from deepseek_jax.train.experiment import Experiment

  found = load_config(config_path)
  if not isinstance(found, Experiment):
    raise ConfigError(f'{config_path}: expected an Experiment, found {type(found).__name__}')
  return found


def named_config(name: str, config_path: str | None = None) -> Any:
  """Returns what a run's config file gives: the file given, or the one of that name in configs/.

  Args:
    name: of the experiment.
    config_path: as `--config` takes it, or None.

  Returns:
    An `Experiment`, or None where there is no such file.

  Raises:
    ConfigError: the file given cannot be read, or gives something else.
  """
  if config_path is None:
    file = CONFIGS / f'{name}.py'
    # The name is a run's own: it may hold anything, a path among it.
    if not name.isidentifier() or name.startswith('_') or not file.is_file():
      return None
    config_path = str(file)
  return load_experiment(config_path)


def try_report(workdir: pathlib.Path, name: str, config_path: str | None) -> None:
  """Draws a run's report; whatever fails is a warning, since the run itself is well.

  Args:
    workdir: the folder of the run.
    name: of the experiment.
    config_path: as `--config` takes it, or None.
  """
  command = f'python scripts/report.py --workdir={workdir}'
  command += f' --config={shlex.quote(config_path)}' if config_path else ''
  try:
    from deepseek_jax.train.report_page import write_report

    print(f'report: {write_report(workdir, named_config(name, config_path))}', flush=True)
  except Exception as error:
    message = f'{type(error).__name__}: {error}'
    print(f'warning: no report was drawn ({message}); to repeat it: {command}', file=sys.stderr)


def find_member(cluster: str, by_hand: tuple[str | None, int | None, int | None]) -> Any:
  """Returns which process of how many this is, a `Member`; None where it is the only one.

  Args:
    cluster: who says so; 'auto' looks at the process's environment, 'alone' at nothing.
    by_hand: coordinator, count and index, or None thrice.

  Raises:
    ConfigError: what is said is not enough, or contradicts itself.
  """
  # Whoever trains alone imports no more than before: this is the standard library.
  from deepseek_jax.sharding import processes

  member = processes.from_arguments(*by_hand)
  if member is not None:
    return member if member.count != 1 else None
  if cluster == 'auto':
    cluster = processes.find_cluster(os.environ) or 'alone'
  return None if cluster == 'alone' else processes.CLUSTERS[cluster](os.environ)


def run_member(member: Any, work: Callable[[], int]) -> int:
  """Runs one process of several; what fails in one ends that one at once, and so all.

  Args:
    member: which process this is.
    work: returns the exit code.
  """
  from deepseek_jax.sharding import processes

  try:
    processes.start(member)
    # Only the first prints; what others have to say goes to their logs, once there are any.
    quiet = contextlib.nullcontext() if jax_index() == 0 else contextlib.redirect_stdout(None)
    with quiet:
      return work()
  except BaseException as error:
    # An ordinary exit would wait for the others, who wait for this process.
    code = 2 if isinstance(error, ConfigError) else 1
    text = f'error: {error}' if code == 2 else traceback.format_exc()
    print(text.rstrip(), file=sys.stderr, flush=True)
    os._exit(code)


def jax_index() -> int:
  """Returns the number of this process."""
  import jax

  return jax.process_index()


def run(main: Callable[[], int | None], usage: str) -> None:
  """Runs a script without `--config` overrides; a `ConfigError` is one message and exit code 2."""
  run_with_config(lambda path, assignments: main(), usage)


def run_with_config(main: Callable[[str | None, dict[str, str]], int | None], usage: str) -> None:
  """Runs `main(config path, overrides)` after taking `--config…` off the command line.

  Args:
    main: returns the exit code, None for 0.
    usage: the script's help.
  """

  def call(path: str | None, assignments: dict[str, str], words: list[str]) -> int | None:
    if words:
      raise ConfigError(f'unexpected argument {words[0]!r}; see --help')
    return main(path, assignments)

  _run(call, usage)


def run_with_arguments(main: Callable[[list[str]], int | None], usage: str) -> None:
  """Runs `main(arguments that are no flags)`; a `ConfigError` is one message and exit code 2.

  Args:
    main: returns the exit code, None for 0.
    usage: the script's help.
  """

  def call(path: str | None, assignments: dict[str, str], words: list[str]) -> int | None:
    if path is not None or assignments:
      raise ConfigError('unexpected argument --config; see --help')
    return main(words)

  _run(call, usage)


def _run(main: Callable[[str | None, dict[str, str], list[str]], int | None], usage: str) -> None:
  """Runs `main(config path, overrides, other arguments)`."""
  found: list[tuple[str | None, dict[str, str], list[str]]] = []

  def parse(argv: list[str]) -> list[str]:
    try:
      rest, assignments, path = peel(argv)
      if any(word in ('-h', '--help', '-help') for word in rest[1:]):
        sys.stdout.write(usage.strip() + '\n')
        sys.exit(0)
      left = flags.FLAGS(rest)
    except (ConfigError, flags.Error) as error:
      _fail(error)
    found.append((path, assignments, left[1:]))
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
    except OSError as error:
      from deepseek_jax.train.disk import is_full

      if not is_full(error):
        raise
      _fail(ConfigError(f'{error.filename or "a file"}: the disk is full: {error.strerror}'))
    return None

  app.run(guarded, flags_parser=parse)


def _fail(error: Exception) -> NoReturn:
  print(f'error: {error}', file=sys.stderr)
  sys.exit(2)
