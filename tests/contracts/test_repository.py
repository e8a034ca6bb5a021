"""What may be in the repository: sizes, paths of a machine, executable bits, entries at the top."""

import os
import pathlib
import re

import pytest

LARGEST_BYTES = 8_000_000
# A file system's root followed by a folder of one machine; `example.org/home/` is none.
MACHINE_PATH = re.compile(r'(?<![\w.)}\]-])/(?:work|root|home|Users)/\w|file:///')
ENTRIES = (
  '.ci/run',
  '.gitignore',
  'Dockerfile',
  'LICENSE',
  'README.md',
  'configs',
  'deepseek_jax',
  'experiments',
  'pyproject.toml',
  'requirements.lock',
  'scripts',
  'scripts/quickstart.sh',
  'scripts/setup.sh',
  'scripts/test.sh',
  'setup.py',
  'tests',
)


def large_files(paths):
  """Lists files too large to keep in a repository."""
  return [str(path) for path in paths if path.stat().st_size > LARGEST_BYTES]


def machine_paths(path: pathlib.Path):
  """Lists lines of a text file that name a place on somebody's machine."""
  content = path.read_bytes()
  if b'\0' in content or path.suffix in ('.xz', '.gz', '.npz', '.png'):
    return []
  lines = content.decode('utf-8').splitlines()
  return [f'{path}:{i}: {line}' for i, line in enumerate(lines, 1) if MACHINE_PATH.search(line)]


def executable_faults(path: pathlib.Path, *, must: bool):
  """Lists what is wrong with the executable bit of a file."""
  with path.open('rb') as file:
    shebang = file.read(2) == b'#!'
  executable = os.access(path, os.X_OK) and bool(path.stat().st_mode & 0o111)
  faults = []
  if must and not executable:
    faults.append(f'{path}: should be executable')
  if must and not shebang:
    faults.append(f'{path}: should start with #!')
  if executable and not shebang:
    faults.append(f'{path}: is executable but nothing says by what')
  return faults


def missing_entries(root: pathlib.Path):
  """Lists what should be there and is not."""
  return [name for name in ENTRIES if not (root / name).exists()]


def test_files_are_small(repository_files):
  """A clone is quick, and stays so."""
  assert len(repository_files) > 10
  assert not large_files(repository_files)


def test_no_path_of_a_machine(repository_files, root):
  """Nothing here depends on where it was written."""
  # This file has examples of what it forbids; a Dockerfile describes a machine of its own.
  exempt = {pathlib.Path(__file__).resolve(), root / 'Dockerfile'}
  chosen = [path for path in repository_files if path not in exempt]
  faults = [fault for path in chosen for fault in machine_paths(path)]
  assert not faults, '\n'.join(faults)


def test_what_is_executable(repository_files, root):
  """Shell scripts and the entry of CI are; nothing is by accident."""
  faults = []
  for path in repository_files:
    name = path.relative_to(root).as_posix()
    must = re.fullmatch(r'scripts/[^/]*\.sh|\.ci/run', name) is not None
    faults += executable_faults(path, must=must)
  assert not faults, '\n'.join(faults)


def test_top_level_is_complete(root):
  """What a newcomer looks for is where it should be."""
  assert missing_entries(root) == []


@pytest.mark.parametrize(
  'line',
  [
    'cd /home/ann/x',
    'path = "/work/data"',
    '--out=/root/runs',
    'PATH=/Users/ann/bin',
    'pip install -f file:///mirror',
  ],
)
def test_machine_paths_are_noticed(tmp_path, line):
  """Wherever in a line they stand."""
  path = tmp_path / 'a.md'
  path.write_text(f'fine\n{line}\n', encoding='utf-8')
  assert machine_paths(path) == [f'{path}:2: {line}']


@pytest.mark.parametrize(
  'line',
  [
    'https://example.org/home/x',
    'runs/work/a',
    '${HOME}/work/a',
    'at home/work',
    'a /tmp/x /workshop/y',
  ],
)
def test_other_paths_pass(tmp_path, line):
  """Addresses and relative paths are nobody's machine."""
  path = tmp_path / 'a.md'
  path.write_text(line, encoding='utf-8')
  assert machine_paths(path) == []


def test_large_files_are_noticed(tmp_path):
  """By size on disk, sparse or not."""
  small, large = tmp_path / 'small', tmp_path / 'large'
  for path, size in ((small, LARGEST_BYTES), (large, LARGEST_BYTES + 1)):
    with path.open('wb') as file:
      file.truncate(size)
  assert large_files([small, large]) == [str(large)]


def test_executable_bits_are_noticed(tmp_path):
  """Missing where needed, and present where nothing can run."""
  path = tmp_path / 'a.sh'
  path.write_text('#!/bin/sh\n', encoding='utf-8')
  path.chmod(0o644)
  assert len(executable_faults(path, must=True)) == 1
  assert executable_faults(path, must=False) == []
  path.chmod(0o755)
  assert executable_faults(path, must=True) == []
  path.write_text('plain text\n', encoding='utf-8')
  assert len(executable_faults(path, must=False)) == 1
  path.chmod(0o644)
  assert len(executable_faults(path, must=True)) == 2


def test_missing_entries_are_noticed(tmp_path):
  """All of them at once."""
  (tmp_path / 'setup.py').touch()
  assert missing_entries(tmp_path) == [name for name in ENTRIES if name != 'setup.py']
