"""Entries of the store are built once, whole or not at all, by any number of processes."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from deepseek_jax.data import store

# Takes many entries while others do.
RACER = """
import pathlib, sys, time
import numpy as np
from deepseek_jax.data import store

folder = pathlib.Path(sys.argv[1])

def build(scratch):
  with (folder / 'builds.log').open('a') as log:
    log.write('built\\n')
  time.sleep(0.05)
  np.save(scratch / 'a.npy', np.arange(1000))
  return {'size': 1000}

print('ready', flush=True)
sys.stdin.readline()
for round in range(30):
  entry = store.entry(folder, f'x-{round}', build)
  assert entry.meta == {'size': 1000}
  assert int(entry.array('a').sum()) == 499500
"""


def build_ones(scratch):
  """A small entry."""
  np.save(scratch / 'a.npy', np.ones(10, np.int32))
  return {'what': 'ones'}


def refuse(scratch):
  """For entries that must be there already."""
  raise AssertionError('built again')


def test_built_once(tmp_path):
  """And read from the disk, memory-mapped, after that."""
  first = store.entry(tmp_path / 'new', 'x', build_ones)
  second = store.entry(tmp_path / 'new', 'x', refuse)
  assert first == second
  assert second.meta == {'what': 'ones'}
  assert isinstance(second.array('a'), np.memmap)
  with pytest.raises(ValueError, match='read-only'):
    second.array('a')[0] = 5
  assert [path.name for path in (tmp_path / 'new').iterdir()] == ['x']


@pytest.mark.parametrize('name', ['a.npy', 'meta.json'])
@pytest.mark.parametrize(
  'damage',
  [
    lambda path: path.write_bytes(path.read_bytes()[:-7]),
    lambda path: path.write_bytes(b''),
    pathlib.Path.unlink,
  ],
  ids=['cut', 'emptied', 'removed'],
)
def test_damaged_entries_are_built_again(tmp_path, name, damage):
  """Whichever file was cut, emptied or removed."""
  path = store.entry(tmp_path, 'x', build_ones).path
  damage(path / name)
  np.testing.assert_array_equal(store.entry(tmp_path, 'x', build_ones).array('a'), np.ones(10))
  store.entry(tmp_path, 'x', refuse)
  assert [entry.name for entry in tmp_path.iterdir()] == ['x']


def test_other_format_is_built_again(tmp_path):
  """The version is in the record as well as in the key."""
  path = store.entry(tmp_path, 'x', build_ones).path
  record = json.loads((path / 'meta.json').read_text())
  (path / 'meta.json').write_text(json.dumps(record | {'format': -1}))
  assert store.entry(tmp_path, 'x', build_ones).meta == {'what': 'ones'}


def test_failed_build_leaves_nothing(tmp_path):
  """The next process starts afresh."""

  def fail(scratch):
    (scratch / 'a.npy').write_bytes(b'half')
    raise RuntimeError('disk full')

  with pytest.raises(RuntimeError, match='disk full'):
    store.entry(tmp_path, 'x', fail)
  assert not list(tmp_path.iterdir())


def test_keys():
  """Depend on the kind and on every part, not on their order."""
  assert store.key('a', {'x': 1, 'y': 2}) == store.key('a', {'y': 2, 'x': 1})
  different = [('a', {'x': 1}), ('b', {'x': 1}), ('a', {'x': 2}), ('a', {'x': 1, 'y': 0})]
  assert len({store.key(*pair) for pair in different}) == 4


def test_many_processes_at_once(tmp_path):
  """All get whole entries; nothing is left behind."""
  command = [sys.executable, '-c', RACER, str(tmp_path)]
  racers = [
    subprocess.Popen(
      [*command, str(i)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(3)
  ]
  for racer in racers:
    assert racer.stdout.readline() == 'ready\n'
  for racer in racers:
    racer.stdin.write('go\n')
    racer.stdin.flush()
  for racer in racers:
    _, errors = racer.communicate(timeout=120)
    assert racer.returncode == 0, errors
  # They did race: some entry was built more than once.
  assert len((tmp_path / 'builds.log').read_text().splitlines()) > 30
  assert len(list(tmp_path.iterdir())) == 31
