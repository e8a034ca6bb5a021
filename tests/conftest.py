"""What every test stands on: eight host devices, asked for before JAX starts."""

import atexit
import os
import pathlib
import shutil
import tempfile

DEVICES = 8

# Plain assignment would throw away flags that somebody set on purpose.
_FLAG = f'--xla_force_host_platform_device_count={DEVICES}'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAG}'.strip()
os.environ['JAX_PLATFORMS'] = 'cpu'
# Programs that several tests (and the processes they start) compile alike are compiled once.
_COMPILED = tempfile.mkdtemp(prefix='deepseek_jax_compiled_')
atexit.register(shutil.rmtree, _COMPILED, ignore_errors=True)
os.environ['JAX_COMPILATION_CACHE_DIR'] = _COMPILED
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '2'

import pytest  # noqa: E402


@pytest.fixture(scope='session')
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder for tokens and pack plans that all tests of one run share."""
  return tmp_path_factory.mktemp('cache')
