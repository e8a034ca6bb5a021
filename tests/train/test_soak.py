"""A hundred kills: a run that dies goes on as if it had not. `pytest -m slow -s` shows where."""

import collections
import contextlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.checkpoint_reader import read_tree
from deepseek_jax.train.metrics import JsonLines
from deepseek_jax.train.seal import find_damage

ROOT = pathlib.Path(__file__).resolve().parents[2]
KILLS = 100
STEPS = 120
CLOCKED = (
  'tokens_per_second',
  'mfu',
  'seconds_left',
  'elapsed_seconds',
  'peak_memory_bytes',
  'host_seconds',
)
SMALL = (
  '--config=configs/tiny_mla.py',
  '--config.model.depth=2',
  '--config.model.mtp=None',
  '--config.model.width=16',
  '--config.data.length=16',
  '--config.cadence.log=1',
  '--config.cadence.save=5',
  '--config.cadence.evaluate=40',
  '--config.cadence.evaluate_batches=1',
  f'--config.train_steps={STEPS}',
  '--display=line',
)


class Runs:
  """Starts the same run in any folder, in a process of its own."""

  def __init__(self, folder: pathlib.Path):
    """Writes the text that the runs learn from."""
    self.folder = folder
    words = 'we hold these truths to be self evident that all men are created equal'.split()
    generator = np.random.default_rng(1)
    for number in range(20):
      text = ' '.join(generator.choice(words, 60))
      (folder / f'{number}.txt').write_text(text + '\n')
    self.environ = {
      **os.environ,
      'PYTHONPATH': str(ROOT),
      'PYTHONUNBUFFERED': '1',
      'XLA_FLAGS': '',
      'JAX_PLATFORMS': 'cpu',
      # Every process runs the very same machine code, compiled by the first.
      'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }

  def start(self, workdir: pathlib.Path) -> subprocess.Popen:
    """Starts the run, or goes on with it."""
    command = [
      sys.executable,
      'scripts/train.py',
      *SMALL,
      f'--config.data.source=TextFiles("{self.folder}/*.txt")',
      f'--cache_dir={self.folder / "cache"}',
      f'--workdir={workdir}',
    ]
    with (self.folder / 'output.txt').open('wb') as output:
      return subprocess.Popen(
        command, cwd=ROOT, env=self.environ, stdout=output, stderr=subprocess.STDOUT
      )

  def output(self) -> str:
    """What the newest process has printed so far."""
    return (self.folder / 'output.txt').read_text(errors='replace')

  def finish(self, workdir: pathlib.Path) -> None:
    """Runs to the end."""
    assert self.start(workdir).wait(timeout=900) == 0, self.output()

  def kill(
    self, workdir: pathlib.Path, process: subprocess.Popen, noise: random.Random
  ) -> str | None:
    """Kills the run somewhere; says in which phase, or None if it had ended before."""
    begin, since = newest_row(workdir), time.time_ns()
    phase = noise.choice(('start-up', 'step', 'step', 'save', 'save', 'save'))
    if phase == 'start-up':
      time.sleep(noise.uniform(0.0, 6.0))
    elif phase == 'step':
      # Rows beyond the checkpoint are dropped before they are written again: wait for that first.
      wait_for(lambda: 'going on' in self.output() or 'compiling' in self.output(), process)
      target = noise.randint(1, 30)
      wait_for(lambda: newest_row(workdir) >= min(begin - begin % 5 + target, STEPS - 1), process)
      time.sleep(noise.uniform(0.0, 0.1))
    else:
      skip = noise.randint(0, 4)
      seen: set[str] = set()

      def enough() -> bool:
        seen.update(half_saved(workdir, since))
        return len(seen) > skip

      wait_for(enough, process)
      time.sleep(noise.uniform(0.0, 0.15))
    process.send_signal(signal.SIGKILL)
    if process.wait(timeout=60) == 0:
      return None
    assert process.returncode == -signal.SIGKILL, 'the run failed by itself'
    if half_saved(workdir, since):
      return 'during a save'
    return 'between saves' if 'step ' in self.output() else 'start-up'


def wait_for(condition, process: subprocess.Popen) -> bool:
  """Waits until something is so; whether it became so before the process ended."""
  deadline = time.monotonic() + 900
  while process.poll() is None:
    if condition():
      return True
    assert time.monotonic() < deadline
    time.sleep(0.005)
  return False


def newest_row(workdir: pathlib.Path) -> int:
  """The last step in the log."""
  path = workdir / 'metrics.jsonl'
  return path.read_bytes().count(b'\n') if path.exists() else 0


def half_saved(workdir: pathlib.Path, since: int) -> set[str]:
  """Checkpoints that are being written, without what earlier kills left behind."""
  found = set()
  for path in workdir.glob('checkpoints/*orbax-checkpoint-tmp*'):
    with contextlib.suppress(FileNotFoundError):
      if path.stat().st_ctime_ns > since:
        found.add(path.name)
  return found


def everything(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """Every array of the newest checkpoint by address: weights, optimizer, the lot."""
  checkpoints = Checkpoints(workdir / 'checkpoints')
  assert checkpoints.latest() == STEPS
  path = workdir / 'checkpoints' / str(STEPS)
  assert find_damage(path) is None
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), read_tree(path))
  leaves = jax.tree_util.tree_leaves_with_path(checkpoints.restore(shapes).state)
  return {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}


def rows(workdir: pathlib.Path, name: str) -> list[dict]:
  """A log without what depends on the clock."""
  found = JsonLines(workdir / name).read()
  return [{key: value for key, value in row.items() if key not in CLOCKED} for row in found]


def assert_same(left: pathlib.Path, right: pathlib.Path) -> None:
  """Asserts that two runs ended with the same bits and wrote the same logs."""
  ours, theirs = everything(left), everything(right)
  assert set(ours) == set(theirs)
  assert sum('opt_state' in address for address in ours) > 20
  for address, value in ours.items():
    assert value.dtype == theirs[address].dtype
    np.testing.assert_array_equal(
      value.reshape(-1).view(np.uint8), theirs[address].reshape(-1).view(np.uint8), address
    )
  assert [row['step'] for row in rows(left, 'metrics.jsonl')] == list(range(1, STEPS + 1))
  for name in ('metrics.jsonl', 'evaluations.jsonl'):
    assert rows(left, name) == rows(right, name), name


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_a_hundred_kills(tmp_path):
  noise = random.Random(7)
  runs = Runs(tmp_path)
  whole = tmp_path / 'whole'
  runs.finish(whole)
  # A second whole run: two processes agree at all, and the first one's compilations serve.
  runs.finish(tmp_path / 'again')
  assert_same(tmp_path / 'again', whole)
  landed: collections.Counter[str] = collections.Counter()
  finished, workdir, since = 0, tmp_path / 'killed', time.monotonic()
  while landed.total() < KILLS or workdir.exists():
    process = runs.start(workdir)
    if landed.total() < KILLS:
      phase = runs.kill(workdir, process, noise)
    else:
      assert process.wait(timeout=900) == 0, runs.output()
      phase = None
    if phase is not None:
      landed[phase] += 1
      print(f'kill {landed.total()}: {phase}, row {newest_row(workdir)}', flush=True)
      continue
    assert_same(workdir, whole)
    finished += 1
    shutil.rmtree(workdir)
  seconds = time.monotonic() - since
  print(f'{landed.total()} kills in {seconds:.0f} s over {finished} runs: {dict(landed)}')
  assert landed.total() == KILLS
  assert min(landed.values()) >= 5, 'the kills fell on one phase'
  assert len(landed) == 3
