"""A full disk loses nothing: earlier checkpoints and logs stay whole, and the message is clear."""

import pathlib
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.core.override import override
from deepseek_jax.data.source import TextFiles
from deepseek_jax.train import checkpoint, disk
from deepseek_jax.train.board import Board
from deepseek_jax.train.checkpoint import Checkpoints, restore_params
from deepseek_jax.train.disk import DiskFullError
from deepseek_jax.train.display import QuietDisplay
from deepseek_jax.train.loop import train
from deepseek_jax.train.metrics import JsonLines
from deepseek_jax.train.seal import find_damage
from deepseek_jax.train.workdir import Workdir

MEGABYTE = 1 << 20
ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 8 MB; skipped where this user may not mount one."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  command = ['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', str(folder)]
  try:
    done = subprocess.run(command, capture_output=True, check=False)
  except FileNotFoundError:
    pytest.skip('there is no mount command')
  if done.returncode:
    pytest.skip(f'mount is refused: {done.stderr.decode().strip()}')
  yield folder
  subprocess.run(['umount', '-l', str(folder)], check=True)


def state(megabytes: float, value: float = 1.0):
  return {'params': {'w': jnp.full((round(megabytes * MEGABYTE / 4),), value)}, 'buffers': {}}


def fill(folder: pathlib.Path, leave: int) -> pathlib.Path:
  """Writes a file that leaves so many bytes free."""
  path = folder / 'filler'
  path.write_bytes(bytes(disk.free_bytes(folder) - leave))
  return path


def names(folder: pathlib.Path) -> list[str]:
  return sorted(path.name for path in folder.iterdir())


def test_a_save_that_does_not_fit_is_not_begun(small_disk):
  folder = small_disk / 'checkpoints'
  with Checkpoints(folder, keep=1) as checkpoints:
    checkpoints.save(1, state(2), {}, {})
    checkpoints.wait()
    with pytest.raises(DiskFullError) as caught:
      checkpoints.save(2, state(6), {}, {})
    assert not checkpoints.saving
  assert names(folder) == ['1']
  (message,) = caught.value.messages
  assert message.startswith(f'{folder}: the disk is full: the checkpoint of step 2 needs 7.00 MiB')
  assert message.endswith('MiB are free')


def test_the_disk_fills_up_in_the_middle_of_a_save(small_disk, monkeypatch):
  """The system itself says no: the room is taken after it was looked at."""
  monkeypatch.setattr(checkpoint, 'free_bytes', lambda path: 1 << 60)
  folder = small_disk / 'checkpoints'
  with Checkpoints(folder, keep=1) as checkpoints:
    checkpoints.save(1, state(2), {'step': 1}, {})
    checkpoints.wait()
    checkpoints.save(2, state(6), {'step': 2}, {})
    with pytest.raises(DiskFullError, match=r'step 2 needs 7\.00 MiB, .* are free') as caught:
      checkpoints.wait()
    cause = caught.value.__cause__
    assert 'No space left' in repr(cause) or 'No space left' in repr(cause.__cause__)
    assert names(folder) == ['1'], 'what was written of it is gone'
    # The same object saves again once there is room.
    checkpoints.save(3, state(2, 3.0), {'step': 3}, {})
  assert names(folder) == ['3']
  assert find_damage(folder / '3') is None
  assert np.unique(restore_params(folder)[0]['w']) == [3.0]


def test_a_file_size_limit_is_a_full_disk(tmp_path):
  """Quotas speak with other numbers; this one needs no mount."""
  code = """
    import pathlib, resource, sys
    import jax.numpy as jnp
    from deepseek_jax.train.checkpoint import Checkpoints
    from deepseek_jax.train.disk import DiskFullError
    folder = pathlib.Path(sys.argv[1])
    with Checkpoints(folder) as checkpoints:
      checkpoints.save(1, {'params': jnp.ones(9), 'buffers': {}}, {}, {})
      checkpoints.wait()
      resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
      checkpoints.save(2, {'params': jnp.ones(1 << 20), 'buffers': {}}, {}, {})
      try:
        checkpoints.wait()
      except DiskFullError as error:
        print(error)
    print(sorted(path.name for path in folder.iterdir()))
  """
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(code), str(tmp_path / 'c')],
    env={'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=True,
  )
  assert 'Traceback' not in done.stderr
  message, left = done.stdout.splitlines()
  assert 'c: the disk is full: the checkpoint of step 2 needs 5.00 MiB' in message
  assert left == "['1']"


def test_a_row_that_does_not_fit_leaves_the_log_as_it_was(small_disk):
  lines = JsonLines(small_disk / 'metrics.jsonl')
  lines.append({'step': 1, 'loss': 2.0})
  # Blocks are of 4 kB: the file may still grow to the end of its own.
  fill(small_disk, 0)
  with pytest.raises(DiskFullError, match=r'metrics\.jsonl: the disk is full: the row of step 2'):
    lines.append({'step': 2, 'text': 'x' * 9000})
  assert lines.read() == [{'step': 1, 'loss': 2.0}]
  with pytest.raises(DiskFullError, match='a shortened copy of the log'):
    lines.truncate(1)
  assert lines.read() == [{'step': 1, 'loss': 2.0}]
  assert names(small_disk) == ['filler', 'metrics.jsonl']


def test_curves_that_do_not_fit_are_an_error_and_nothing_hangs(small_disk):
  board = Board(small_disk / 'tensorboard', None)
  board.scalar(1, 'loss', 2.0)
  board.close()
  (file,) = (small_disk / 'tensorboard').iterdir()
  before = file.read_bytes()
  fill(small_disk, 0)
  for step in range(2, 2000):
    board.scalar(step, 'loss', 2.0)
  with pytest.raises(DiskFullError, match='tensorboard: the disk is full: a curve'):
    board.close()
  assert file.read_bytes() == before
  board.close()
  with pytest.raises(DiskFullError, match='tensorboard'):
    Board(small_disk / 'more' / 'tensorboard', 3)


def test_what_a_full_disk_is():
  assert disk.is_full(OSError(28, 'No space left on device'))
  assert disk.is_full(ValueError('RESOURCE_EXHAUSTED: … [OS error 28: ENOSPC …]'))
  assert not disk.is_full(PermissionError(13, 'Permission denied'))
  assert not disk.is_full(ValueError('x'))
  outer = RuntimeError('saving')
  outer.__cause__ = OSError(122, 'Disk quota exceeded')
  assert disk.is_full(outer)


def test_room_is_looked_at_before_a_run(tmp_path, monkeypatch):
  monkeypatch.setattr(disk, 'free_bytes', lambda path: 10 * MEGABYTE)
  assert disk.check_room(tmp_path, state(1), kept=4, present=0) is None
  warning = disk.check_room(tmp_path, state(1), kept=9, present=1)
  assert warning == (
    f'{tmp_path}: 10.00 MiB are free; the checkpoints of this run will take up to 16.00 MiB more'
  )
  with pytest.raises(DiskFullError, match=r'a checkpoint of this run needs 13\.00 MiB, 10\.00'):
    disk.check_room(tmp_path, state(12), kept=9, present=9)


class Filler(QuietDisplay):
  """Fills the disk at a step, once the state before it is saved; may empty it at a warning."""

  def __init__(self, folder: pathlib.Path, full_at: int, saved: int, empties: bool = False):
    self.folder, self.full_at, self.empties = folder, full_at, empties
    self.saved = folder / 'run' / 'checkpoints' / str(saved)
    self.texts: list[str] = []

  def update(self, step, metrics):
    if step == self.full_at:
      deadline = time.monotonic() + 300
      while not self.saved.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
      # The logs go on; a checkpoint does not fit.
      fill(self.folder, leave=200_000)

  def message(self, text):
    self.texts.append(text)
    if self.empties and text.startswith('warning: '):
      (self.folder / 'filler').unlink()


@pytest.fixture(scope='module')
def text(tmp_path_factory) -> str:
  """A folder of small documents, as a glob."""
  folder = tmp_path_factory.mktemp('text')
  for number in range(20):
    (folder / f'{number}.txt').write_text(f'number {number} comes before {number + 1}. ' * 9)
  return f'{folder}/*.txt'


def experiment(text: str, **changes):
  """A run of seconds: two layers, short rows."""
  return override(
    tiny_mla.get_config(),
    {
      'model.depth': 2,
      'model.mtp': None,
      'data.source': TextFiles(text),
      'data.length': 32,
      'schedule.warmup_steps': 2,
      'cadence.log': 1,
      **changes,
    },
  )[0]


def losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
  """Step and loss of each row of the log."""
  return [(row['step'], row['loss']) for row in JsonLines(workdir / 'metrics.jsonl').read()]


def start(config, folder: pathlib.Path, cache: pathlib.Path, display):
  """Trains in a folder, as the script does."""
  workdir = Workdir(folder)
  workdir.write(config)
  return train(config, workdir, cache, display)


@pytest.fixture(params=['looked at', pytest.param('taken meanwhile', marks=pytest.mark.slow)])
def noticed(request, monkeypatch) -> str:
  """Whether a full disk is noticed before a save or by it."""
  if request.param == 'taken meanwhile':
    monkeypatch.setattr(checkpoint, 'free_bytes', lambda path: 1 << 60)
  return request.param


def test_a_run_outlives_a_disk_that_is_full_for_a_while(noticed, text, small_disk, cache_dir):
  config = experiment(text, **{'cadence.save': 2, 'train_steps': 8, 'cadence.keep': 1})
  display = Filler(small_disk, full_at=3, saved=2, empties=True)
  folder = small_disk / 'run'
  assert start(config, folder, cache_dir, display).step == 8
  assert Checkpoints(folder / 'checkpoints').latest() == 8
  faults = JsonLines(folder / 'faults.jsonl').read()
  assert [fault['kind'] for fault in faults] == ['full_disk']
  assert 'the checkpoint of step 4 needs' in faults[0]['message']
  assert any('trying again at the next save' in text for text in display.texts)
  assert [step for step, _ in losses(folder)] == list(range(1, 9))


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_and_loses_nothing(
  noticed, text, small_disk, cache_dir
):
  config = experiment(text, **{'cadence.save': 2, 'train_steps': 12})
  folder = small_disk / 'run'
  with pytest.raises(DiskFullError) as caught:
    start(config, folder, cache_dir, Filler(small_disk, full_at=3, saved=2))
  assert 'the disk is full: the checkpoint of step 6 needs' in caught.value.messages[0]
  assert 'the run can go on after step 2, once there is room' in caught.value.messages[1]
  assert names(folder / 'checkpoints') == ['2']
  assert find_damage(folder / 'checkpoints' / '2') is None
  logged = [step for step, _ in losses(folder)]
  assert logged == list(range(1, len(logged) + 1))
  assert len(logged) >= 5
  # With the disk still full it does not even begin; with room it goes on to the same end.
  with pytest.raises(DiskFullError, match='a checkpoint of this run needs'):
    start(config, folder, cache_dir, QuietDisplay())
  (small_disk / 'filler').unlink()
  assert start(config, folder, cache_dir, QuietDisplay()).step == 12
  other = small_disk / 'other'
  assert start(config, other, cache_dir, QuietDisplay()).step == 12
  assert losses(other) == losses(folder)
  left, right = (restore_params(path / 'checkpoints')[0] for path in (folder, other))
  jax.tree.map(np.testing.assert_array_equal, left, right)


def test_the_last_state_must_be_saved(text, small_disk, cache_dir):
  config = experiment(text, **{'cadence.save': 4, 'train_steps': 8})
  with pytest.raises(DiskFullError, match='go on after step 4') as caught:
    start(config, small_disk / 'run', cache_dir, Filler(small_disk, full_at=6, saved=4))
  assert 'the checkpoint of step 8 needs' in caught.value.messages[0]
