"""Libraries that only some data needs, and what to install where one is missing."""

import importlib.util

from deepseek_jax.core.config import ConfigError

_PACKAGES = {
  'av': 'av',
  'espeakng_loader': 'espeakng-loader',
  'pyarrow': 'pyarrow',
  'sklearn': 'scikit-learn',
  'soundfile': 'soundfile',
  'trimesh': 'trimesh',
}
_EXTRAS = {'espeakng_loader': 'speech'}


def present(module: str) -> bool:
  """Whether an optional library is installed; it is not imported."""
  return importlib.util.find_spec(module) is not None


def need(module: str, what: str) -> None:
  """Refuses to go on without an optional library.

  Args:
    module: its name in an import.
    what: what needs it.

  Raises:
    ConfigError: it is not installed; says what to install.
  """
  if not present(module):
    extra = _EXTRAS.get(module, 'media')
    raise ConfigError(
      f"{what} needs the optional package {_PACKAGES[module]}: pip install 'deepseek_jax[{extra}]'"
    )
