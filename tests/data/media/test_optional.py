"""Optional libraries: asked for by name, never imported to see whether they are there."""

import sys

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.media.optional import need, present


def test_present():
  assert present('numpy')
  assert not present('no_such_module_anywhere')


def test_need(monkeypatch):
  need('sklearn', 'x') if present('sklearn') else None
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(
    ConfigError, match=r'Speech needs .*espeakng-loader: .*deepseek_jax\[speech\]'
  ):
    need('espeakng_loader', 'Speech')


def test_importing_the_sources_imports_none_of_them():
  """A run without media pays for none."""
  import subprocess

  code = (
    'import sys, deepseek_jax.data.media.rows\n'
    'print(sorted({"av", "soundfile", "trimesh", "pyarrow", "sklearn", "scipy.signal", "grain"}'
    ' & set(sys.modules)))'
  )
  result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert result.stdout.strip() == '[]'
