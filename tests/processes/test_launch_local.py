"""Several processes train as one does, and what kills one costs no more than the way back."""

import os
import re
import signal
import time

import numpy as np
import pytest

from deepseek_jax.train.metrics import JsonLines
from deepseek_jax.train.seal import find_damage
from tests.processes.conftest import assert_same_bits, losses, rows

STEPS = 12
CLOSE = {'rtol': 2e-5}
"""Sums over devices are taken in another order."""


def steps_saved(workdir):
  """The steps in the folder of checkpoints."""
  return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())


def test_two_processes_of_which_one_is_killed(launch):
  """The default test: same losses as one process, though process 1 died on the way."""
  launch.run('one', 1, devices=2)
  # Checkpoints alone would bring it back to step 4.
  running = launch.start('two', 2, cadence__snapshot='Snapshot(every=1)')
  running.reach(7)
  os.kill(running.process(1), signal.SIGKILL)
  said = running.end()
  assert 'process 1 died: by SIGKILL' in said
  assert 'starting all 2 again' in said
  assert int(re.search(r'going on after step (\d+), from snapshots', said)[1]) >= 5
  assert not list((launch.folder / 'two/snapshots').glob('*/*')), 'the end is saved for good'
  one, two = launch.folder / 'one', launch.folder / 'two'
  assert len(losses(two)) == STEPS
  np.testing.assert_allclose(losses(two), losses(one), **CLOSE)
  # Held-out rows are no multiple of the batch: the last batch is filled up.
  evaluations = [rows(path, 'evaluations.jsonl') for path in (one, two)]
  assert len(evaluations[0]) == len(evaluations[1]) == 2
  for ours, theirs in zip(*evaluations, strict=True):
    assert ours['targets'] == theirs['targets']
    np.testing.assert_allclose(ours['loss'], theirs['loss'], **CLOSE)
  # Only the first process writes; each has its log.
  events = JsonLines(two / 'events.jsonl').read()
  assert [row['event'] for row in (events[0], *events[-2:])] == ['started', 'resumed', 'finished']
  assert events[-2]['reason'] == 'from snapshots'
  assert len(list((two / 'tensorboard').iterdir())) == 2
  for index in range(2):
    assert f'step {STEPS}/{STEPS}' in (two / f'logs/process_{index}.log').read_text()
  assert said.count(f'step {STEPS}/{STEPS}') == 1
  assert not (one / 'logs').exists()
  assert find_damage(two / f'checkpoints/{STEPS}') is None


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_run_ends_with_the_same_bits(launch):
  """Whichever process is killed, the run resumes as if it had not been; all stop within 30 s."""
  whole = launch.folder / 'whole'
  launch.run('whole', 2)
  for victim in range(2):
    name = f'killed_{victim}'
    running = launch.start(name, 2)
    running.reach(6)
    os.kill(running.process(victim), signal.SIGKILL)
    said = running.end()
    assert f'process {victim} died: by SIGKILL' in said
    seconds = float(re.search(r'all had ended ([0-9.]+) s later', said)[1])
    assert seconds < 30
    assert_same_bits(launch.folder / name, whole, STEPS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sigterm_to_one_stops_all_after_the_same_step(launch):
  """One process is told to stop: all save the same step, once, and leave with code 0."""
  running = launch.start('asked', 2, train_steps='4000', cadence__save='100000')
  running.reach(6)
  os.kill(running.process(1), signal.SIGTERM)
  said = running.end()
  saved = int(re.search(r'SIGTERM: saved step (\d+)', said)[1])
  asked = launch.folder / 'asked'
  assert steps_saved(asked) == [saved]
  for index in range(2):
    assert f'SIGTERM: saved step {saved}' in (asked / f'logs/process_{index}.log').read_text()
  assert [row['event'] for row in JsonLines(asked / 'events.jsonl').read()] == [
    'started',
    'stopped',
  ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sigterm_while_compiling_ends_all(launch):
  """Before the first step there is nothing to save; all leave with code 0 all the same."""
  running = launch.start('early', 2, model__width='24')
  logs = launch.folder / 'early/logs/process_1.log'
  while not logs.exists() or 'compiling' not in logs.read_text():
    assert running.launcher.poll() is None, running.said()
    time.sleep(0.01)
  os.kill(running.process(1), signal.SIGTERM)
  assert 'SIGTERM: stopped before the first new step' in running.end()
  assert not (launch.folder / 'early/checkpoints').exists()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_four_processes_save_and_fewer_go_on(launch):
  """A run of four goes on with two, and with one; the losses are those of one process."""
  # A save waits for the one before it, so that step 8 is whole long before the end.
  launch.run('reference', 1, devices=4, train_steps='24')
  for processes, step in ((4, 4), (2, 8)):
    running = launch.start('shrinking', processes, '--restarts=0', train_steps='24')
    running.keep(step)
    os.kill(running.process(1), signal.SIGKILL)
    assert running.launcher.wait(timeout=400) != 0
  said = launch.run('shrinking', 1, train_steps='24')
  # All three starts are in the output; the last is meant.
  assert int(re.findall(r'going on after step (\d+)', said)[-1]) >= 8
  folder = launch.folder
  np.testing.assert_allclose(losses(folder / 'shrinking'), losses(folder / 'reference'), rtol=1e-4)
  # The checkpoint that four wrote fits one that was alone all the time.
  assert steps_saved(folder / 'shrinking') == steps_saved(folder / 'reference')


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
  ('name', 'changes'),
  [
    ('tensor', {'rules': 'TENSOR', 'mesh': 'MeshConfig(model=2)'}),
    ('expert', {'rules': 'EXPERT', 'mesh': 'MeshConfig(expert=2)'}),
    ('parts', {'microbatches': '2', 'mesh': 'MeshConfig(replica=2)'}),
    ('speech', {'prompts': "('we hold',)", 'cadence__sample': '6', 'ema': 'EMA(decay=0.9)'}),
  ],
)
def test_axes_that_span_processes(launch, name, changes):
  """Hosts may share heads, experts or replicas: what they compute stays the same."""
  changes = {**changes, 'train_steps': '6'}
  if name == 'expert':
    changes |= {'model__feed_forward__dispatch': 'AllToAll()', 'model__dense_layers': '1'}
  launch.run(f'{name}_1', 1, devices=2, **changes)
  launch.run(f'{name}_2', 2, **changes)
  one, two = launch.folder / f'{name}_1', launch.folder / f'{name}_2'
  np.testing.assert_allclose(losses(two), losses(one), **CLOSE)
  if name == 'speech':
    samples = [JsonLines(path / 'samples.jsonl').read() for path in (one, two)]
    assert samples[0] == samples[1]
    assert len(samples[0]) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_process_that_hangs_ends_all(launch):
  """Nobody can see that a stopped process is stopped, except that no sign of life comes."""
  running = launch.start('hung', 2, '--restarts=0', train_steps='100000', cadence__log='50')
  running.reach(1)
  victim, other = running.process(1), running.process(0)
  os.kill(victim, signal.SIGSTOP)
  begin = time.monotonic()
  try:
    while os.path.exists(f'/proc/{other}/cmdline') and time.monotonic() - begin < 60:
      if running.launcher.poll() is not None:
        break
      time.sleep(0.1)
    assert time.monotonic() - begin < 45
  finally:
    os.kill(victim, signal.SIGCONT)
  assert running.launcher.wait(timeout=120) != 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_loses_a_process_goes_on_with_fewer(launch):
  """The batch stays whole: it is cut into more parts; no row is seen twice or never."""
  launch.run('before', 1, devices=4)
  running = launch.start('lost', 4, '--after_death=fewer')
  running.reach(6)
  os.kill(running.process(2), signal.SIGKILL)
  said = running.end()
  assert 'going on with 2 processes of 4' in said
  assert '--config.microbatches=2' in said
  lost, before = launch.folder / 'lost', launch.folder / 'before'
  np.testing.assert_allclose(losses(lost), losses(before), rtol=1e-4)
  assert JsonLines(lost / 'events.jsonl').read()[-1]['event'] == 'finished'


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_slow_process_is_named(launch):
  """A process that the system lets run half of the time holds the others up, and is named."""
  running = launch.start('slow', 2, train_steps='100000', cadence__log='100', cadence__save='None')
  running.reach(100)
  victim = running.process(1)
  faults = launch.folder / 'slow/faults.jsonl'
  deadline = time.monotonic() + 180
  while not faults.exists() and time.monotonic() < deadline:
    os.kill(victim, signal.SIGSTOP)
    time.sleep(0.01)
    os.kill(victim, signal.SIGCONT)
    time.sleep(0.005)
  running.launcher.send_signal(signal.SIGTERM)
  said = running.end()
  (row,) = [row for row in JsonLines(faults).read() if row['process'] == 1][:1]
  assert row['kind'] == 'straggler'
  assert 'process 1' in row['message']
  assert 'holds the others up' in said
