"""What every test stands on: eight host devices, asked for before JAX starts."""

import atexit
import gc
import os
import pathlib
import shutil
import tempfile

DEVICES = 8

# Plain assignment would throw away flags that somebody set on purpose.
_FLAG = f'--xla_force_host_platform_device_count={DEVICES}'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAG}'.strip()
os.environ['JAX_PLATFORMS'] = 'cpu'
# A test compiles more than it computes. Set it to 0 to test what a user's programs are.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
# Programs that several tests (and the processes they start) compile alike are compiled once.
_COMPILED = tempfile.mkdtemp(prefix='deepseek_jax_compiled_')
atexit.register(shutil.rmtree, _COMPILED, ignore_errors=True)
os.environ['JAX_COMPILATION_CACHE_DIR'] = _COMPILED
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '2'

import jax  # noqa: E402
import pytest  # noqa: E402

MAPPINGS = 16_384
"""A quarter of the regions of memory that Linux lets a process have."""


@pytest.fixture(autouse=True, scope='module')
def release_programs():
  """Lets go of compiled programs after a file of tests, before they are too many.

  Each loop of a program on CPU is code in regions of its own. Where there are no more to be had,
  XLA does not say so: the process dies.
  """
  yield
  maps = pathlib.Path('/proc/self/maps')
  if maps.exists() and maps.read_bytes().count(b'\n') > MAPPINGS:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope='session')
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder for tokens and pack plans that all tests of one run share."""
  return tmp_path_factory.mktemp('cache')


@pytest.fixture
def write_run(tmp_path):
  """Writes the files of a run that never ran: `write_run(name, rows=…, changes=…, **files)`."""
  import json
  import math

  from configs import tiny_mla
  from deepseek_jax.core.override import override
  from deepseek_jax.train.metrics import JsonLines
  from deepseek_jax.train.workdir import Workdir

  def write(name: str, rows: int = 20, changes: dict | None = None, **files) -> pathlib.Path:
    path = tmp_path / name
    experiment, _ = override(tiny_mla.get_config(), changes or {})
    Workdir(path).write(experiment)
    for step in range(1, rows + 1):
      shares = [(1 + expert + step % 3) / (4 * (step % 3) + 10) for expert in range(4)]
      JsonLines(path / 'metrics.jsonl').append(
        {
          'step': step,
          'loss': 5 / math.sqrt(step),
          'bits_per_byte': 4 / math.sqrt(step),
          'grad_norm': 1 / step,
          'learning_rate': 1e-3,
          'tokens_per_second': 1000.0 + step,
          'mfu': 0.4,
          'elapsed_seconds': step * 2.0,
          'peak_memory_bytes': 10**9 + step,
          'load': {'layers/1': shares, 'layers/2': shares[::-1]},
          'max_violation': [0.1 * step, 0.2],
          'dead_fraction': [0.0, 0.25],
        }
      )
    for file, content in files.items():
      if isinstance(content, list):
        for row in content:
          JsonLines(path / f'{file}.jsonl').append(row)
      else:
        (path / f'{file}.json').write_text(json.dumps(content), encoding='utf-8')
    return path

  return write
