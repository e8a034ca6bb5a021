"""The way a config of this package says what is wrong with it."""

from collections.abc import Mapping

from deepseek_jax.core.config import ConfigError


def check_fields(config: object, checks: Mapping[str, tuple[bool, str]]) -> None:
  """Raises one error that lists every field of a config that fails its check.

  Args:
    config: the object whose fields were checked.
    checks: field name to (whether it holds, what was expected in words).

  Raises:
    ConfigError: at least one check does not hold.
  """
  kind = type(config).__name__
  faults = [
    f'{kind}.{field}: found {getattr(config, field)!r}, expected {expected}'
    for field, (holds, expected) in checks.items()
    if not holds
  ]
  if faults:
    raise ConfigError(faults)
