"""Where a run happens: versions, machine, devices, commit; nothing that names a person."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax

PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'numpy',
  'tokenizers',
)
VARIABLES = ('JAX_PLATFORMS', 'XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'JAX_ENABLE_X64')
"""Of the process's environment, those that change what is computed or how fast."""
ROOT = pathlib.Path(__file__).resolve().parents[2]


def collect(environ: Mapping[str, str], root: pathlib.Path = ROOT) -> dict[str, Any]:
  """Looks at the machine, the packages and the devices JAX found.

  Args:
    environ: the process's environment; a few variables that concern JAX are kept, without paths.
    root: folder of the source code, asked for its commit.

  Returns:
    Sections of plain data: 'versions', 'machine', 'devices', 'source' (absent where the source is
    not a git checkout) and 'variables' (absent where none is set).
  """
  devices = Counter(f'{device.platform}: {device.device_kind}' for device in jax.devices())
  found: dict[str, Any] = {
    'versions': {'python': platform.python_version(), **_versions()},
    'machine': _machine(),
    'devices': {
      'backend': jax.default_backend(),
      'processes': jax.process_count(),
      'devices': [f'{count} × {kind}' for kind, count in sorted(devices.items())],
    },
  }
  source = _source(root)
  if source:
    found['source'] = source
  variables = {name: _without_paths(environ[name]) for name in VARIABLES if environ.get(name)}
  if variables:
    found['variables'] = variables
  return found


def write(path: pathlib.Path, environment: Mapping[str, Any]) -> None:
  """Writes the file; where an earlier start of the run was elsewhere, that is kept beside it.

  Args:
    path: of `environment.json`.
    environment: what `collect` gave.
  """
  earlier: list[Any] = []
  if path.exists():
    before = read(path)
    earlier = before.pop('earlier', [])
    if before and before != environment:
      earlier.append(before)
  content = {**environment, **({'earlier': earlier} if earlier else {})}
  fresh = path.with_name(path.name + '.new')
  fresh.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
  os.replace(fresh, path)


def read(path: pathlib.Path) -> dict[str, Any]:
  """Returns what was written, empty where there is no file or it is no JSON object."""
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return {}
  return content if isinstance(content, dict) else {}


def _versions() -> dict[str, str]:
  found = {}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = 'not installed'
  return found


def _machine() -> dict[str, Any]:
  cores = os.cpu_count() or 0
  if hasattr(os, 'sched_getaffinity'):
    cores = len(os.sched_getaffinity(0))
  found: dict[str, Any] = {
    'system': f'{platform.system()} {platform.release()}',
    'architecture': platform.machine(),
    'processor': _processor(),
    'cores': cores,
  }
  with contextlib.suppress(ValueError, OSError, AttributeError):  # not every system tells
    found['memory_bytes'] = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  return {name: value for name, value in found.items() if value}


def _processor() -> str:
  """The model's name, which Python itself does not know on Linux."""
  try:
    for line in pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  except OSError:
    pass
  return platform.processor()


def _source(root: pathlib.Path) -> dict[str, str]:
  """Commit of the source; an installed copy inside somebody's repository is not asked."""
  if not (root / '.git').exists():
    return {}
  try:
    commit = _git(root, 'rev-parse', 'HEAD')
    changed = _git(root, 'status', '--porcelain', '--untracked-files=no')
  except (OSError, subprocess.SubprocessError):
    return {}
  return {'commit': commit, 'changes': 'not committed' if changed else 'none'}


def _git(root: pathlib.Path, *words: str) -> str:
  command = ['git', '-C', str(root), *words]
  result = subprocess.run(command, capture_output=True, check=True, text=True, timeout=20)
  return result.stdout.strip()


def _without_paths(value: str) -> str:
  """Leaves out the values that are paths: they often hold a name."""
  words = value.split()
  return ' '.join(
    f'{word.partition("=")[0]}=(path)' if '/' in word or '\\' in word else word for word in words
  )
