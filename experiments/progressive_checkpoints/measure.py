"""What a fault costs with checkpoints alone, and with snapshots between them; and what these cost.

python -m experiments.progressive_checkpoints.measure --what=kills   # real processes, killed
python -m experiments.progressive_checkpoints.measure --what=cost    # step time
"""

import argparse
import functools
import json
import os
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = pathlib.Path(__file__).parent / 'figures.json'
SAVE, SNAPSHOT = 50, 5
"""Steps between checkpoints, and between snapshots."""
ARMS = {'checkpoints': 'None', 'snapshots': f'Snapshot(every={SNAPSHOT})'}
SMALL = {
  'model.depth': '2',
  'model.dense_layers': '2',
  'model.mtp': 'None',
  'model.width': '16',
  'data.length': '16',
  'cadence.log': '1',
  'cadence.save': str(SAVE),
  'train_steps': '100000',
}


def kills(count: int, processes: int) -> dict[str, Any]:
  """Kills a run `count` times in each arm; returns the steps that each kill lost.

  Args:
    count: kills of each arm.
    processes: of the run.
  """
  lost: dict[str, list[int]] = {}
  for arm, kind in ARMS.items():
    # Both arms are killed equally far from where they began.
    noise = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
      lost[arm] = killed(pathlib.Path(folder), kind, noise, count, processes)
    print(arm, lost[arm], flush=True)
  means = {arm: statistics.mean(steps) for arm, steps in lost.items()}
  saved = 1 - means['snapshots'] / means['checkpoints']
  return {
    'save_steps': SAVE,
    'snapshot_steps': SNAPSHOT,
    'processes': processes,
    'lost_steps': lost,
    'mean_lost_steps': means,
    'saved_share': saved,
  }


def killed(
  folder: pathlib.Path, kind: str, noise: random.Random, count: int, processes: int
) -> list[int]:
  """Starts a run that is started again after each kill; returns the steps lost by each."""
  changes = SMALL | {'cadence.snapshot': kind, 'data.source': f'TextFiles("{folder}/*.txt")'}
  (folder / 'text.txt').write_text('we hold these truths to be self evident \n' * 200)
  command = [sys.executable, 'scripts/launch_local.py', f'--processes={processes}']
  command += ['--restarts=1000', '--fruitless=1000', '--pause_seconds=0', '--']
  command += ['--config=configs/tiny_mla.py', f'--workdir={folder / "run"}', '--display=line']
  command += [f'--cache_dir={folder / "cache"}', *(f'--config.{k}={v}' for k, v in changes.items())]
  output = folder / 'output'
  with output.open('wb') as stream:
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
  lost, begin = [], 0
  try:
    for number in range(count):
      target = begin + noise.randint(SAVE, 2 * SAVE)
      reached = wait_for(functools.partial(newest, output, number), target, launcher)
      os.kill(noise.choice(children(launcher.pid)), signal.SIGKILL)
      reached = max(reached, *steps(output, number))
      wait_for(lambda: len(restarts(output)), number + 1, launcher)
      begin = restarts(output)[-1]
      lost.append(max(reached, *steps(output, number)) - begin)
  finally:
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(timeout=300)
  return lost


def restarts(output: pathlib.Path) -> list[int]:
  """The steps that the run went on after, so far."""
  return [int(n) for n in re.findall(r'going on after step (\d+)', output.read_text())]


def steps(output: pathlib.Path, part: int) -> list[int]:
  """The steps shown between one restart and the next."""
  parts = re.split(r'going on after step', output.read_text())
  return [int(n) for n in re.findall(r'^step +(\d+)/', parts[min(part, len(parts) - 1)], re.M)]


def newest(output: pathlib.Path, part: int) -> int:
  """The newest of these, 0 before the first."""
  return max(steps(output, part), default=0)


def wait_for(read: Any, target: int, launcher: subprocess.Popen) -> int:
  """Waits until a number is reached; returns it."""
  while (value := read()) < target:
    if launcher.poll() is not None:
      raise RuntimeError(f'the launcher ended with code {launcher.returncode}')
    time.sleep(0.01)
  return value


def children(pid: int) -> list[int]:
  """Processes that a process has started."""
  return [int(n) for n in pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


class Tiers:
  """Keeps a state in one way or another, and remembers for how long it held the run up."""

  def __init__(self, folder: pathlib.Path, experiment: Any):
    """Keeps both tiers in a folder."""
    from deepseek_jax.core.serialise import to_json
    from deepseek_jax.train.checkpoint import Checkpoints
    from deepseek_jax.train.snapshot import Snapshot, Snapshots

    self.config = to_json(experiment)
    self.checkpoints = Checkpoints(folder / 'checkpoints', 1)
    self.snapshots = Snapshots(Snapshot(), folder)
    self.held: dict[str, list[float]] = {'snapshot': [], 'checkpoint': []}

  def keep(self, kind: str, step: int, state: Any) -> None:
    """Keeps a state; 'nothing' does not."""
    begin = time.perf_counter()
    if kind == 'snapshot':
      self.snapshots.save(step, state)
    elif kind == 'checkpoint':
      self.checkpoints.save(step, state, {'step': step}, self.config)
    if kind in self.held:
      self.held[kind].append(time.perf_counter() - begin)

  def wait(self) -> None:
    """Waits until all is written."""
    self.snapshots.wait()
    self.checkpoints.wait()


def cost(config: str, blocks: int, block: int) -> dict[str, Any]:
  """Times blocks of steps with nothing, one snapshot, and one checkpoint in each, in turns.

  Args:
    config: the run whose steps are timed.
    blocks: of each kind.
    block: steps of one.
  """
  import jax

  from deepseek_jax.core.allocator import keep_freed_memory
  from deepseek_jax.core.load import load_config
  from deepseek_jax.core.precision import Float32
  from deepseek_jax.core.tree import bytes_of
  from deepseek_jax.train.experiment import resolved
  from deepseek_jax.train.step import build_program

  keep_freed_memory()
  experiment = resolved(load_config(config), Float32())
  program = build_program(experiment)
  taken: dict[str, list[float]] = {'nothing': [], 'snapshot': [], 'checkpoint': []}
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    batches = experiment.data.prepare(path / 'cache').train_batches(0)
    step = program.step.compile(program.abstract_state, program.abstract_batch())
    state = program.init(jax.random.key(0))
    tiers, done = Tiers(path, experiment), 0
    for number in range(blocks + 1):
      for kind in taken:
        begin = time.perf_counter()
        for place in range(block):
          done += 1
          state, _ = step(state, program.put(next(batches)))
          jax.block_until_ready(state)
          if place == 0:
            tiers.keep(kind, done, state)
        # What is still being written would fall on the next block's time.
        tiers.wait()
        if number:  # the first round warms up
          taken[kind].append((time.perf_counter() - begin) / block)
    tiers.checkpoints.close()
  nothing = taken['nothing']
  shares = {k: [a / b - 1 for a, b in zip(taken[k], nothing, strict=True)] for k in tiers.held}
  return {
    'config': config,
    'state_bytes': bytes_of(state),
    'steps_between': block,
    'step_seconds': {kind: statistics.median(times) for kind, times in taken.items()},
    'held_up_seconds': {kind: statistics.median(times[1:]) for kind, times in tiers.held.items()},
    'cost_share': {kind: statistics.median(found) for kind, found in shares.items()},
    'cost_shares': shares,
  }


def main() -> None:
  """Measures, prints, and adds what was found to figures.json."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--what', choices=['kills', 'cost'], required=True)
  parser.add_argument('--kills', type=int, default=8)
  parser.add_argument('--processes', type=int, default=2)
  parser.add_argument('--config', default='quickstart')
  parser.add_argument('--blocks', type=int, default=6)
  parser.add_argument('--block', type=int, default=10)
  given = parser.parse_args()
  if given.what == 'kills':
    found = kills(given.kills, given.processes)
  else:
    found = cost(given.config, given.blocks, given.block)
  results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  RESULTS.write_text(json.dumps({**results, given.what: found}, indent=2) + '\n')
  print(json.dumps(found, indent=2))


if __name__ == '__main__':
  main()
