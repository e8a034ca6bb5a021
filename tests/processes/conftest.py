"""Real processes on this machine, started by scripts/launch_local.py as a user would."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest

from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.checkpoint_reader import read_tree
from deepseek_jax.train.metrics import JsonLines
from deepseek_jax.train.seal import find_damage

ROOT = pathlib.Path(__file__).resolve().parents[2]
CLOCKED = (
  'tokens_per_second',
  'mfu',
  'seconds_left',
  'elapsed_seconds',
  'peak_memory_bytes',
  'host_seconds',
)
SMALL = {
  'model.depth': '2',
  # Experts are in the slow tests: they take as long to compile as all else.
  'model.dense_layers': '2',
  'model.mtp': 'None',
  'model.width': '16',
  'data.length': '16',
  'cadence.log': '1',
  'cadence.save': '4',
  'cadence.evaluate': '8',
  'cadence.evaluate_batches': '3',
  'train_steps': '12',
}


@dataclasses.dataclass
class Running:
  """A launcher and the processes it has started."""

  launcher: subprocess.Popen
  workdir: pathlib.Path
  output: pathlib.Path

  def process(self, index: int) -> int:
    """Returns the id of one of the processes, once it is there."""

    def find() -> int | None:
      children = f'/proc/{self.launcher.pid}/task/{self.launcher.pid}/children'
      # Each thread of the launcher has its own children; the first starts them all.
      for pid in pathlib.Path(children).read_text().split():
        with contextlib.suppress(OSError):
          words = pathlib.Path(f'/proc/{pid}/cmdline').read_bytes().split(b'\0')
          if f'--process_index={index}'.encode() in words:
            return int(pid)
      return None

    return wait_for(find, self.launcher, self.said)

  def reach(self, step: int) -> None:
    """Waits until a step is logged."""
    rows = JsonLines(self.workdir / 'metrics.jsonl')
    wait_for(lambda: any(row['step'] >= step for row in rows.read()), self.launcher, self.said)

  def keep(self, step: int) -> None:
    """Waits until the checkpoint of a step is whole: it is written while later steps are made."""
    folder = self.workdir / f'checkpoints/{step}'
    wait_for(lambda: folder.exists() and find_damage(folder) is None, self.launcher, self.said)

  def said(self) -> str:
    """Returns what the launcher has printed."""
    return self.output.read_text(errors='replace')

  def end(self, code: int = 0, seconds: float = 400) -> str:
    """Waits for the end; returns what was printed."""
    assert self.launcher.wait(timeout=seconds) == code, self.said()
    return self.said()


def wait_for(find: Callable, process: subprocess.Popen, said: Callable[[], str]):
  """Waits until something is there, and returns it; fails if the process ends before."""
  deadline = time.monotonic() + 400
  while True:
    if found := find():
      return found
    assert process.poll() is None, said()
    assert time.monotonic() < deadline, said()
    time.sleep(0.01)


class Launch:
  """Starts the same small run in any folder, in any number of processes."""

  def __init__(self, folder: pathlib.Path):
    """Writes the text that the runs learn from."""
    self.folder = folder
    self.running: list[subprocess.Popen] = []
    words = 'we hold these truths to be self evident that all men are created equal'.split()
    generator = np.random.default_rng(1)
    (folder / 'text').mkdir()
    for number in range(20):
      text = ' '.join(generator.choice(words, 60))
      (folder / 'text' / f'{number}.txt').write_text(text + '\n')
    self.environ = {
      **os.environ,
      'PYTHONPATH': str(ROOT),
      # All processes run the same machine code, compiled by whichever came first.
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }

  def arguments(self, name: str, changes: dict[str, str]) -> list[str]:
    """Returns the arguments of train.py."""
    small = SMALL | {'data.source': f'TextFiles("{self.folder}/text/*.txt")'} | changes
    return [
      '--config=configs/tiny_mla.py',
      f'--workdir={self.folder / name}',
      f'--cache_dir={self.folder / "cache"}',
      '--display=line',
      *(f'--config.{key}={value}' for key, value in small.items()),
    ]

  def start(
    self, name: str, processes: int, *flags: str, devices: int = 1, **changes: str
  ) -> Running:
    """Starts a run; `model__depth='3'` changes `model.depth`."""
    given = {key.replace('__', '.'): value for key, value in changes.items()}
    output = self.folder / f'{name}.out'
    command = [sys.executable, 'scripts/launch_local.py', f'--processes={processes}']
    command += [f'--devices={devices}', *flags, '--', *self.arguments(name, given)]
    with output.open('ab') as stream:
      launcher = subprocess.Popen(
        command, cwd=ROOT, env=self.environ, stdout=stream, stderr=subprocess.STDOUT
      )
    self.running.append(launcher)
    return Running(launcher, self.folder / name, output)

  def run(self, name: str, processes: int, *flags: str, devices: int = 1, **changes: str) -> str:
    """Runs to the end; returns what was printed."""
    return self.start(name, processes, *flags, devices=devices, **changes).end()

  def end(self) -> None:
    """Ends what a failed test has left behind."""
    for launcher in self.running:
      if launcher.poll() is None:
        launcher.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
          launcher.wait(timeout=60)


@pytest.fixture(scope='module')
def launch(tmp_path_factory):
  """Starts runs; see `Launch`."""
  launch = Launch(tmp_path_factory.mktemp('processes'))
  yield launch
  launch.end()


def rows(workdir: pathlib.Path, name: str = 'metrics.jsonl') -> list[dict]:
  """A log without what depends on the clock."""
  found = JsonLines(workdir / name).read()
  return [{key: value for key, value in row.items() if key not in CLOCKED} for row in found]


def losses(workdir: pathlib.Path) -> list[float]:
  """The loss of every step."""
  found = rows(workdir)
  assert [row['step'] for row in found] == list(range(1, len(found) + 1))
  return [row['loss'] for row in found]


def everything(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  """Every array of a checkpoint by address: weights, optimizer, the lot."""
  path = workdir / 'checkpoints' / str(step)
  assert find_damage(path) is None
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), read_tree(path))
  state = Checkpoints(workdir / 'checkpoints').restore(shapes, step).state
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}


def assert_same_bits(left: pathlib.Path, right: pathlib.Path, step: int) -> None:
  """Asserts that two runs ended with the same bits and wrote the same logs."""
  ours, theirs = everything(left, step), everything(right, step)
  assert set(ours) == set(theirs)
  assert sum('opt_state' in address for address in ours) > 20
  for address, value in ours.items():
    np.testing.assert_array_equal(
      value.reshape(-1).view(np.uint8), theirs[address].reshape(-1).view(np.uint8), address
    )
  for name in ('metrics.jsonl', 'evaluations.jsonl'):
    assert rows(left, name) == rows(right, name), name
