"""Sweeps as a user runs them: checked before they run, killed, gone on with, and partly failing."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.metrics import JsonLines

ROOT = pathlib.Path(__file__).resolve().parents[2]
HEAD = """
from configs import tiny_mla
from deepseek_jax.core.override import override
from deepseek_jax.core.sweep import chain, product, seeds
from deepseek_jax.data.source import TextFiles
from deepseek_jax.lab.match import FlopsPerToken, WallClock
from deepseek_jax.layers.feed_forward import SwiGLU

SMALL = {
  'model.depth': 2, 'model.width': 16, 'model.mtp': None, 'model.dense': SwiGLU(hidden=8),
  'model.dense_layers': 2, 'data.length': 16, 'data.source': TextFiles('TEXT'), 'train_steps': 200,
  'schedule.warmup_steps': 1, 'cadence.log': 20,
}

def base():
  return override(tiny_mla.get_config(), SMALL)[0]
"""
TWO = 'def variants():\n  return chain({}, wide={"model.width": 24})\n'
MIXED = """
def variants():
  return chain(
    short={},
    long={'cadence.save': 20},
    broken={'data.source': TextFiles('NOWHERE/*.txt')},
  )
"""


@pytest.fixture
def write_question(tmp_path) -> Callable[[str], str]:
  """Writes `asked/sweep.py` with a small base and the lines given; returns the flag for it."""
  text = tmp_path / 'text.txt'
  words = 'we hold these truths to be self evident that all men are created equal '
  text.write_text('\n\n'.join(words * (1 + number % 3) for number in range(40)))

  def write(lines: str) -> str:
    file = tmp_path / 'asked' / 'sweep.py'
    file.parent.mkdir(exist_ok=True)
    content = HEAD.replace('TEXT', str(text)) + lines.replace('NOWHERE', str(tmp_path / 'nowhere'))
    file.write_text(content)
    return f'--experiment={file}'

  return write


@pytest.fixture
def flags(tmp_path, cache_dir) -> list[str]:
  """Where the sweep lies, and its cache."""
  return [f'--output={tmp_path / "out"}', f'--cache_dir={cache_dir}']


def start(*arguments: str) -> subprocess.Popen:
  """Starts the sweep in a process of its own, with one host device; every program is kept."""
  environ = {**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
  environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
  return subprocess.Popen(
    [sys.executable, 'scripts/sweep.py', *arguments],
    cwd=ROOT,
    env=environ,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process: subprocess.Popen, code: int) -> str:
  """Waits for a sweep and returns what it printed."""
  output, _ = process.communicate(timeout=400)
  assert process.returncode == code, output
  assert 'Traceback' not in output, output
  return output


def wait_for(process: subprocess.Popen, run: pathlib.Path, step: int) -> None:
  """Waits until a run has saved a step."""
  deadline = time.time() + 300
  while (
    not (run / 'checkpoints').is_dir() or (Checkpoints(run / 'checkpoints').latest() or 0) < step
  ):
    assert process.poll() is None, process.communicate()[0]
    assert time.time() < deadline
    time.sleep(0.01)


def content(folder: pathlib.Path) -> dict[str, tuple[int, bytes]]:
  """Every file below a folder, and when it was written."""
  files = [path for path in sorted(folder.rglob('*')) if path.is_file()]
  return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def happened(run: pathlib.Path) -> list[str]:
  """The events of a run."""
  return [row['event'] for row in JsonLines(run / 'events.jsonl').read()]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_a_failing_run_stops_nothing(write_question, flags, tmp_path):
  question, out = write_question(MIXED), tmp_path / 'out'
  process = start(question, *flags)
  wait_for(process, out / 'long/seed_0', 20)
  child = int((out / 'logs/long.seed_0.lock').read_text())
  process.kill()
  os.kill(child, signal.SIGKILL)
  process.communicate()
  finished, config = content(out / 'short'), (out / 'sweep.json').read_bytes()
  saved = Checkpoints(out / 'long/seed_0/checkpoints').latest()
  assert saved < 200
  assert happened(out / 'short/seed_0') == ['started', 'finished']

  output = finish(start(question, *flags), code=1)
  assert '1 of 3 runs are finished already' in output
  assert 'start   short' not in output
  assert content(out / 'short') == finished
  assert (out / 'sweep.json').read_bytes() == config
  assert f'going on after step {saved}' in (out / 'logs/long.seed_0.log').read_text()
  assert happened(out / 'long/seed_0') == ['started', 'resumed', 'finished']
  assert Checkpoints(out / 'long/seed_0/checkpoints').latest() == 200
  assert re.search(r'done    long/seed_0  bits/byte \d\.\d+  \d', output)
  # What fails is named with its reason, and leaves no figures behind.
  assert '1 of 3 runs failed' in output
  assert re.search(r'FAILED  broken/seed_0  step 0/200: .*nowhere', output)
  assert happened(out / 'broken/seed_0')[-1] == 'failed'
  assert not (out / 'broken/seed_0/evaluations.jsonl').exists()
  assert '2 of 3 runs are finished; the same command tries the rest again' in output


@pytest.mark.slow
def test_stopped_and_orphaned_runs_save(write_question, flags, tmp_path):
  """SIGTERM saves and is no failure; a run whose sweep was killed saves by itself."""
  lines = "def variants():\n  return chain(long={'train_steps': 2000, 'cadence.save': 20})\n"
  question, out = write_question(lines), tmp_path / 'out'
  run = out / 'long/seed_0'
  process = start(question, *flags, '--workers=2')
  wait_for(process, run, 20)
  process.send_signal(signal.SIGTERM)
  output = finish(process, code=0)
  assert 'stopped long/seed_0' in output
  assert '0 of 1 runs are finished; SIGTERM: the same command goes on' in output
  saved = Checkpoints(run / 'checkpoints').latest()
  process = start(question, *flags)
  wait_for(process, run, saved + 20)
  process.kill()
  process.communicate()
  deadline = time.time() + 60
  while happened(run) != ['started', 'stopped', 'resumed', 'stopped']:
    assert time.time() < deadline, happened(run)
    time.sleep(0.1)


def test_a_plan_says_what_runs(write_question, flags, tmp_path, run_script):
  question = write_question(TWO + 'match = FlopsPerToken()\n')
  more = [*flags, '--steps=1000', '--seeds=2']
  outcome = run_script('sweep', question, *more, '--dry_run')
  assert outcome.code == 0, outcome.errors
  for words in ('model.width: 16 → 24', 'matched by FlopsPerToken', 'training FLOPs a step', '1000',
                '2 variants × 2 seeds = 4 runs', 'all checks passed'):  # fmt: skip
    assert words in outcome.output, words
  assert not (tmp_path / 'out').exists()
  outcome = run_script('sweep', question, *more, '--print_commands')
  lines = outcome.output.splitlines()
  assert [shlex.split(line)[-1] for line in lines] == [f'--index={index}' for index in range(4)]
  for word in (question, '--seeds=2', '--steps=1000', *flags):
    assert all(word in shlex.split(line) for line in lines), word
  plan = json.loads((tmp_path / 'out/sweep.json').read_text())
  assert list(plan['variants']) == ['base', 'wide']
  assert plan['seeds'] == [0, 1]
  wide = plan['variants']['wide']
  assert wide['changes'] == ['model.width: 16 → 24']
  assert wide['matched']['asked_steps'] == 1000
  assert wide['matched']['steps'] == wide['train_steps'] < 1000
  outcome = run_script('sweep', question, *more, '--slurm')
  assert '#SBATCH --array=0-3' in outcome.output
  assert outcome.output.endswith('--index="$SLURM_ARRAY_TASK_ID"\n')
  check = subprocess.run(['bash', '-n'], input=outcome.output, text=True, check=False)
  assert check.returncode == 0


@pytest.mark.parametrize(
  ('lines', 'messages'),
  [
    (
      'def variants():\n  return product({"model.depht": [1, 2], "train_steps": [2.5]})\n',
      ['all 2 variants: model.depht: `DeepSeekV3` has no field `depht`; did you mean `depth`?',
       'all 2 variants: train_steps: 2.5 is not int'],
    ),
    (
      'def variants():\n  return chain({}, same={"model.width": 16}, big={"model.vocab": 9})\n',
      ['variants base and same are the same config'],
    ),
    (
      'def variants():\n  return chain({}, small={"model.vocab": 9}, odd={"mesh.model": 3})\n',
      ['small: model.vocab is 9, fewer than the 259 tokens', 'odd: mesh'],
    ),
    ('def variants():\n  return {"model.depth": [1]}\n', ['expected a Sweep']),
  ],
)  # fmt: skip
def test_a_faulty_sweep_fails_before_any_run(
  lines, messages, write_question, flags, tmp_path, run_script
):
  outcome = run_script('sweep', write_question(lines), *flags, '--plan')
  assert outcome.code == 2
  for message in messages:
    assert message in outcome.errors, outcome.errors
  assert not (tmp_path / 'out' / 'sweep.json').exists()


def test_results_of_another_version_or_config_are_refused(
  write_question, flags, tmp_path, run_script
):
  question, out = write_question(TWO), tmp_path / 'out'
  assert run_script('sweep', question, *flags, '--plan').code == 0
  # Nothing was trained yet: another plan is welcome.
  assert run_script('sweep', question, *flags, '--plan', '--steps=9').code == 0
  JsonLines(out / 'wide/seed_0/metrics.jsonl').append({'step': 1})
  outcome = run_script('sweep', question, *flags, '--plan', '--steps=7')
  assert outcome.code == 2
  assert 'wide: train_steps: 9 → 7' in outcome.errors
  assert 'start in another --output' in outcome.errors
  plan = json.loads((out / 'sweep.json').read_text())
  (out / 'sweep.json').write_text(json.dumps(plan | {'version': '0.0.1'}))
  for mode in ('--plan', '--index=0', '--dry_run', '--slurm'):
    outcome = run_script('sweep', question, *flags, '--steps=9', mode)
    assert outcome.code == 2
    assert 'are of deepseek_jax 0.0.1' in outcome.errors


@pytest.mark.parametrize(
  ('arguments', 'messages'),
  [
    ([], ['--experiment is missing', '--output is missing']),
    (['--experiment=x.py', '--output=y'], ['there is no file x.py']),
    (['--experiment=x.py', '--output=y', '--plan', '--slurm'], ['--plan, --slurm exclude']),
    (['--experiment=x.py', '--output=y', '--workers=0'], ['workers']),
    (['--experiment=x.py', '--output=y', 'more'], ["unexpected argument 'more'"]),
    (['--experiment=x.py', '--output=y', '--config.seed=1'], ['--config']),
  ],
)
def test_a_wrong_command_line_is_one_message(arguments, messages, run_script):
  outcome = run_script('sweep', *arguments)
  assert outcome.code == 2
  for message in messages:
    assert message in outcome.errors
  assert 'Traceback' not in outcome.errors


def test_a_job_does_not_time_the_machine_for_itself(write_question, flags, run_script):
  question = write_question(TWO + 'match = WallClock()\n')
  outcome = run_script('sweep', question, *flags, '--index=0')
  assert outcome.code == 2
  assert 'run once with --plan' in outcome.errors
  outcome = run_script('sweep', write_question(TWO), *flags, '--index=2')
  assert 'expected 0 to 1' in outcome.errors
