"""Takes `--config=…` and `--config.path=value` off the command line, before flags are parsed."""

from collections.abc import Sequence

from deepseek_jax.core.config import ConfigError


def peel(
  argv: Sequence[str], prefix: str = 'config'
) -> tuple[list[str], dict[str, str], str | None]:
  """Splits the arguments of a program into those of the config and the rest.

  Understands `--config=PATH`, `--config PATH`, `--config.a.b=value` and `--config.a.b value`, with
  one dash or two, up to an argument `--`.

  Args:
    argv: the program's arguments; its name in front is kept.
    prefix: the name of the config flag.

  Returns:
    The arguments that are not for the config, in order; dotted path → text (of equal paths,
    the last); and the path of the config file, or None.

  Raises:
    ConfigError: with every flag that has no value, and a second `--config`.
  """
  rest: list[str] = []
  assignments: dict[str, str] = {}
  config_path: str | None = None
  faults: list[str] = []
  arguments = list(argv)
  while arguments:
    argument = arguments.pop(0)
    if argument == '--':
      rest += [argument, *arguments]
      break
    name, equals, value = argument.partition('=')
    path = _config_path(name, prefix)
    if path is None:
      rest.append(argument)
      continue
    if not equals:
      if not arguments or arguments[0].startswith('--'):
        faults.append(f'{name} needs a value: {name}=…')
        continue
      value = arguments.pop(0)
    if path:
      assignments.pop(path, None)  # the last one counts, and its place in the order too
      assignments[path] = value
    elif name.endswith('.'):
      faults.append(f'{argument} names no field; write one like --{prefix}.model.depth=…')
    elif not value:
      faults.append(f'{name} needs the path of a config file')
    elif config_path is not None:
      faults.append(f'{name} is given twice: {config_path} and {value}')
    else:
      config_path = value
  if faults:
    raise ConfigError(faults)
  return rest, assignments, config_path


def _config_path(name: str, prefix: str) -> str | None:
  """The dotted path that a flag names, '' for the config itself, None for all other arguments."""
  for dashes in ('--', '-'):
    if name == f'{dashes}{prefix}':
      return ''
    if name.startswith(f'{dashes}{prefix}.'):
      return name.removeprefix(f'{dashes}{prefix}.')
  return None
