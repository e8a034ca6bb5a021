"""Who may import whom, who reads flags and the environment, and what importing the package does."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

# Leftmost first: a package imports only from the groups after its own.
ORDER = (
  ('scripts',),
  ('experiments',),
  ('configs',),
  ('lab',),
  ('hub',),
  ('serve', 'pods'),
  ('tune',),
  ('train', 'infer', 'convert'),
  ('models', 'data', 'optim', 'quant'),
  ('layers',),
  ('ops', 'sharding'),
  ('formats',),
  ('core',),
)
RANK = {name: rank for rank, group in enumerate(ORDER) for name in group}
TOPS = ('scripts', 'experiments', 'configs')
ENVIRONMENT = ('environ', 'environb', 'getenv', 'getenvb', 'putenv', 'unsetenv')


def imported(source):
  """Yields (line, dotted name) of everything a file imports, wherever in the file it does."""
  for node in ast.walk(source.tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, alias.name
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ''
      if node.level:
        # `from . import x` in a/b/c.py is relative to a.b, and in a/b/__init__.py too.
        parts = source.path.split('/')[: -node.level]
        base = '.'.join([*parts, *filter(None, [node.module])])
      for alias in node.names:
        yield node.lineno, f'{base}.{alias.name}'
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith('import_module'):
      names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
      yield from ((node.lineno, name) for name in names)


def package_of(name):
  """Returns our package that a dotted name is in, '' for the root, None for a third party."""
  parts = name.split('.')
  if parts[0] in TOPS:
    return parts[0]
  if parts[0] != 'deepseek_jax':
    return None
  # `from deepseek_jax import __version__` needs the root alone.
  return parts[1] if len(parts) > 1 and not parts[1].startswith('__') else ''


def order_faults(source):
  """Lists imports that go against the order."""
  faults = []
  if source.package and source.package not in RANK:
    faults.append(f'{source.path}: package `{source.package}` has no place in the import order')
  for line, name in imported(source):
    package = package_of(name)
    if package in (None, '', source.package):
      continue
    place = f'{source.path}:{line}'
    if source.package == '':
      faults.append(f'{place}: the root of deepseek_jax imports nothing of its own')
    elif package not in RANK:
      faults.append(f'{place}: `{package}` has no place in the import order')
    elif RANK[package] <= RANK.get(source.package, -1):
      faults.append(f'{place}: `{source.package}` may not import `{package}`')
  return faults


def foreign_faults(source):
  """Lists imports of third parties where they do not belong."""
  faults = []
  for line, name in imported(source):
    place = f'{source.path}:{line}'
    if source.package == 'ops':
      if name.split('.')[0] == 'flax':
        faults.append(f'{place}: ops are functions of arrays; they know no Flax')
      if name.startswith('deepseek_jax.core.config'):
        faults.append(f'{place}: ops are functions of arrays; they know no config')
    if source.package != 'scripts' and (name + '.').startswith(('absl.flags.', 'absl.app.')):
      faults.append(f'{place}: only scripts/ has a command line')
  return faults


def environment_faults(source):
  """Lists uses of the process's environment."""
  faults = []
  for node in ast.walk(source.tree):
    used = isinstance(node, ast.Attribute) and ast.unparse(node) in {
      f'os.{name}' for name in ENVIRONMENT
    }
    if isinstance(node, ast.ImportFrom) and node.module == 'os':
      used = any(alias.name in ENVIRONMENT for alias in node.names)
    if isinstance(node, ast.Import):
      used = any(alias.name == 'os' and alias.asname for alias in node.names)
    if used:
      faults.append(f'{source.path}:{node.lineno}: take `environ` as an argument instead')
  return faults


def uninitialised_folders(root: pathlib.Path):
  """Lists folders of the package that hold Python files but no `__init__.py`."""
  folders = {path.parent for path in (root / 'deepseek_jax').rglob('*.py')}
  return [str(path) for path in sorted(folders) if not (path / '__init__.py').is_file()]


def test_packages_import_only_what_is_to_their_right(all_sources):
  """The order of ARCHITECTURE section 2; tests may import anything."""
  ours = [s for s in all_sources if s.path.startswith(('deepseek_jax/', *TOPS))]
  faults = [fault for source in ours for fault in order_faults(source)]
  assert not faults, '\n'.join(faults)


def test_flax_flags_and_configs_stay_in_their_rooms(all_sources):
  """`ops` imports neither Flax nor configs; only scripts have flags."""
  ours = [s for s in all_sources if s.path.startswith(('deepseek_jax/', *TOPS))]
  faults = [fault for source in ours for fault in foreign_faults(source)]
  assert not faults, '\n'.join(faults)


def test_package_reads_no_environment_variable(sources):
  """Whatever depends on the environment takes it as an argument."""
  faults = [fault for source in sources('deepseek_jax') for fault in environment_faults(source)]
  assert not faults, '\n'.join(faults)


def test_every_folder_is_a_package(root, tmp_path):
  """Without `__init__.py` a folder is left out of wheels."""
  faults = uninitialised_folders(root)
  assert not faults, '\n'.join(faults)
  (tmp_path / 'deepseek_jax' / 'bare').mkdir(parents=True)
  (tmp_path / 'deepseek_jax' / 'bare' / 'a.py').touch()
  (tmp_path / 'deepseek_jax' / '__init__.py').touch()
  assert uninitialised_folders(tmp_path) == [str(tmp_path / 'deepseek_jax' / 'bare')]


IMPORT_ALL = """
import importlib
import sys
from jax._src import xla_bridge
for name in sys.argv[1:]:
  importlib.import_module(name)
  assert not xla_bridge._backends, f'importing {name} started {list(xla_bridge._backends)}'
import jax
jax.numpy.zeros(1)
assert xla_bridge._backends, 'the check above could not have failed'
print('imported', len(sys.argv[1:]))
"""


def import_fresh(names, folder):
  """Imports modules in a new process; each must leave JAX without a started backend.

  An array cannot exist before its backend is started, so this also says that none was made.
  """
  environ = os.environ | {'JAX_PLATFORMS': 'cpu'}
  environ['PYTHONPATH'] = os.pathsep.join([str(folder), environ.get('PYTHONPATH', '')])
  command = [sys.executable, '-W', 'ignore', '-c', IMPORT_ALL, *names]
  return subprocess.run(
    command, capture_output=True, text=True, env=environ, cwd=folder, check=False, timeout=300
  )


def test_importing_touches_no_device(sources, root):
  """After all modules are imported no array was made and no backend was started."""
  paths = [s.path for s in sources('deepseek_jax') if not s.path.endswith('__main__.py')]
  names = [path.removesuffix('.py').removesuffix('/__init__').replace('/', '.') for path in paths]
  result = import_fresh(names, root)
  assert result.returncode == 0, result.stderr
  assert result.stdout.split() == ['imported', str(len(paths))]


def test_an_array_made_on_import_is_noticed(tmp_path):
  """The check of the test above can fail."""
  (tmp_path / 'innocent.py').write_text('import jax\n', encoding='utf-8')
  (tmp_path / 'guilty.py').write_text(
    'import jax.numpy as jnp\nX = jnp.ones(2)\n', encoding='utf-8'
  )
  result = import_fresh(['innocent', 'guilty'], tmp_path)
  assert result.returncode != 0
  assert 'importing guilty started' in result.stderr


@pytest.mark.parametrize(
  ('path', 'text', 'fault'),
  [
    ('deepseek_jax/ops/a.py', 'import deepseek_jax.layers.norm', 'may not import `layers`'),
    ('deepseek_jax/ops/a.py', 'from deepseek_jax import sharding', 'may not import `sharding`'),
    ('deepseek_jax/train/a.py', 'def f():\n  from deepseek_jax.infer import sample', '`infer`'),
    ('deepseek_jax/core/a.py', 'from ..ops import norm', 'may not import `ops`'),
    ('deepseek_jax/core/a.py', 'import importlib\nimportlib.import_module("configs.a")', 'configs'),
    ('deepseek_jax/lab.py', 'import scripts.train', 'may not import `scripts`'),
    ('deepseek_jax/__init__.py', 'from deepseek_jax import lab', 'imports nothing of its own'),
    ('deepseek_jax/__init__.py', 'from . import lab', 'imports nothing of its own'),
    ('deepseek_jax/odd/a.py', 'import math', '`odd` has no place'),
    ('configs/a.py', 'from deepseek_jax.odd import b', '`odd` has no place'),
    ('deepseek_jax/ops/a.py', 'from flax import struct', 'know no Flax'),
    ('deepseek_jax/ops/a.py', 'from deepseek_jax.core.config import ConfigError', 'no config'),
    ('deepseek_jax/lab.py', 'from absl import flags', 'only scripts/'),
    ('configs/a.py', 'import absl.app', 'only scripts/'),
    ('deepseek_jax/lab.py', 'import os\nx = os.environ["A"]', 'take `environ`'),
    ('deepseek_jax/lab.py', 'from os import getenv', 'take `environ`'),
    ('deepseek_jax/lab.py', 'import os as o', 'take `environ`'),
  ],
)
def test_a_forbidden_import_is_noticed(parse, path, text, fault):
  """Each checker reports what it is for."""
  source = parse(path, text)
  faults = order_faults(source) + foreign_faults(source) + environment_faults(source)
  assert len(faults) == 1
  assert fault in faults[0]


@pytest.mark.parametrize(
  ('path', 'text'),
  [
    ('deepseek_jax/layers/a.py', 'import flax.linen as nn\nfrom deepseek_jax.ops import norm'),
    ('deepseek_jax/lab.py', 'from absl import logging\nfrom deepseek_jax import __version__'),
    ('deepseek_jax/ops/attention/a.py', 'from . import latent\nfrom .. import norm'),
    ('deepseek_jax/ops/__init__.py', 'from . import norm\nfrom .norm import rms'),
    ('scripts/train.py', 'import os\nfrom absl import app, flags\nimport configs.quickstart'),
    ('deepseek_jax/infer/a.py', 'import os\nos.path.exists("environ")'),
  ],
)
def test_allowed_imports_pass(parse, path, text):
  """The checkers are not merely strict."""
  source = parse(path, text)
  faults = order_faults(source) + foreign_faults(source)
  if path.startswith('deepseek_jax/'):
    faults += environment_faults(source)
  assert faults == []
