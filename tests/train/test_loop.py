"""A run that is interrupted, in every way we know, is the run that was not."""

import json
import os
import pathlib
import shutil
import signal
import threading
import time

import jax
import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.core.override import override
from deepseek_jax.data.source import TextFiles
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import TENSOR
from deepseek_jax.train.checkpoint import Checkpoints, restore_params
from deepseek_jax.train.display import QuietDisplay
from deepseek_jax.train.interrupt import Stop, StoppedEarlyError, in_background
from deepseek_jax.train.loop import train
from deepseek_jax.train.metrics import JsonLines
from deepseek_jax.train.workdir import Workdir

TIMES = (
  'tokens_per_second',
  'mfu',
  'seconds_left',
  'elapsed_seconds',
  'peak_memory_bytes',
  'host_seconds',
)


def experiment(text: str, **changes):
  """A run of seconds: two layers, eight steps, a checkpoint every four."""
  return override(
    tiny_mla.get_config(),
    {
      'model.depth': 2,
      'model.mtp': None,
      'data.source': TextFiles(text),
      'data.length': 32,
      'schedule.warmup_steps': 2,
      'train_steps': 8,
      'cadence.log': 1,
      'cadence.save': 4,
      'cadence.evaluate': 4,
      **changes,
    },
  )[0]


def run(config, path: pathlib.Path, cache: pathlib.Path, display=None):
  """Trains in `path`, as the script does."""
  workdir = Workdir(path)
  workdir.write(config)
  return train(config, workdir, cache, display or QuietDisplay())


def rows(path: pathlib.Path, name: str = 'metrics.jsonl') -> list[dict]:
  """The rows of a log without what depends on the clock."""
  found = JsonLines(path / name).read()
  return [{key: value for key, value in row.items() if key not in TIMES} for row in found]


def assert_same_end(left: pathlib.Path, right: pathlib.Path) -> None:
  """Asserts that two runs logged the same rows and ended with the same bits."""
  assert rows(left) == rows(right)
  assert rows(left, 'evaluations.jsonl') == rows(right, 'evaluations.jsonl')
  ends = [restore_params(path / 'checkpoints')[:2] for path in (left, right)]
  leaves = [jax.tree.leaves(end) for end in ends]
  assert len(leaves[0]) > 20
  for a, b in zip(*leaves, strict=True):
    np.testing.assert_array_equal(a, b)


class _Signals(QuietDisplay):
  """Sends this process a signal when a step is shown."""

  def __init__(self, step: int):
    self.step = step

  def update(self, step, metrics):
    if step == self.step:
      os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope='module')
def whole(text, tmp_path_factory, cache_dir) -> pathlib.Path:
  """The run that nothing interrupts."""
  path = tmp_path_factory.mktemp('whole')
  outcome = run(experiment(text), path, cache_dir)
  assert (outcome.step, outcome.stopped_by) == (8, None)
  assert outcome.evaluation is not None
  assert np.isfinite(outcome.evaluation.bits_per_byte)
  return path


def test_a_run_logs_what_it_did(whole):
  logged = JsonLines(whole / 'metrics.jsonl').read()
  assert [row['step'] for row in logged] == list(range(1, 9))
  assert logged[-1]['loss'] < logged[0]['loss']
  for key in (*TIMES, 'grad_norm', 'learning_rate', 'bits_per_byte', 'auxiliary_loss'):
    assert np.isfinite(logged[-1][key]), key
  assert sum(logged[-1]['load']['layers/1']) == pytest.approx(1, abs=1e-3)
  assert logged[-1]['bias_norm'][0] > 0
  assert [row['step'] for row in rows(whole, 'evaluations.jsonl')] == [4, 8]
  assert json.loads((whole / 'config.json').read_text())['name'] == 'tiny_mla'
  assert Checkpoints(whole / 'checkpoints').steps() == (4, 8)


def test_resumed_is_uninterrupted_bitwise(whole, text, tmp_path, cache_dir):
  path = tmp_path / 'resumed'
  shutil.copytree(whole, path)
  shutil.rmtree(path / 'checkpoints' / '8')
  assert len(rows(path)) == 8, 'rows beyond the checkpoint are there to be dropped'
  assert run(experiment(text), path, cache_dir).step == 8
  assert_same_end(whole, path)


def test_a_damaged_checkpoint_is_set_aside_and_the_rest_is_the_same(
  whole, text, tmp_path, cache_dir
):
  path = tmp_path / 'damaged'
  shutil.copytree(whole, path)
  files = [file for file in (path / 'checkpoints' / '8').rglob('*') if file.is_file()]
  largest = max(files, key=lambda file: file.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  assert run(experiment(text), path, cache_dir).step == 8
  assert_same_end(whole, path)
  assert (path / 'checkpoints' / '8.damaged').is_dir()
  (fault,) = JsonLines(path / 'faults.jsonl').read()
  assert (fault['step'], fault['kind']) == (4, 'damaged_checkpoint')


def test_a_finished_run_does_nothing(whole, text, tmp_path, cache_dir):
  path = tmp_path / 'finished'
  shutil.copytree(whole, path)
  assert run(experiment(text), path, cache_dir).evaluation is None
  assert rows(path) == rows(whole)


def test_sigterm_saves_and_the_rest_is_the_same(whole, text, tmp_path, cache_dir):
  before = signal.getsignal(signal.SIGTERM)
  outcome = run(experiment(text), tmp_path, cache_dir, _Signals(2))
  assert outcome.stopped_by == 'SIGTERM'
  assert 2 <= outcome.step <= 4
  assert Checkpoints(tmp_path / 'checkpoints').latest() == outcome.step
  assert signal.getsignal(signal.SIGTERM) == before
  assert run(experiment(text), tmp_path, cache_dir).step == 8
  assert rows(tmp_path) == rows(whole)
  left, right = (restore_params(path / 'checkpoints')[0] for path in (whole, tmp_path))
  jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.slow
def test_resume_on_another_mesh(whole, text, tmp_path, cache_dir):
  shutil.copytree(whole, tmp_path / 'moved')
  path = tmp_path / 'moved'
  shutil.rmtree(path / 'checkpoints' / '8')
  moved = experiment(text, mesh=MeshConfig(data=4, model=2), rules=TENSOR)
  assert run(moved, path, cache_dir).step == 8
  for ours, theirs in zip(rows(path), rows(whole), strict=True):
    assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-5)


def test_a_signal_is_heard_while_the_main_thread_waits():
  """Compilation is one long call; it must not keep the signal waiting."""
  release = threading.Event()
  with Stop() as stop:
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    start = time.perf_counter()
    with pytest.raises(StoppedEarlyError, match='SIGTERM'):
      in_background(lambda: release.wait(30), stop)
    assert time.perf_counter() - start < 5
  release.set()


def test_errors_of_background_work_are_raised():
  with Stop() as stop, pytest.raises(ZeroDivisionError):
    in_background(lambda: 1 // 0, stop)


def test_background_work_gives_its_result():
  with Stop() as stop:
    assert in_background(lambda: 42, stop) == 42
