"""The scripts as a user runs them: in processes of their own, killed and asked to stop."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from deepseek_jax.train.checkpoint import Checkpoints, restore_params
from deepseek_jax.train.metrics import JsonLines

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = (
  '--config=configs/tiny_mla.py',
  '--config.model.depth=2',
  '--config.model.mtp=None',
  '--config.data.length=32',
  '--config.cadence.log=1',
)
CLOCKED = (
  'tokens_per_second',
  'mfu',
  'seconds_left',
  'elapsed_seconds',
  'peak_memory_bytes',
  'host_seconds',
)


@pytest.fixture(scope='module')
def text(tmp_path_factory) -> str:
  """A reader's own folder of text, as a glob."""
  folder = tmp_path_factory.mktemp('own')
  words = 'we hold these truths to be self evident that all men are created equal'.split()
  generator = np.random.default_rng(1)
  for number in range(30):
    (folder / f'{number}.txt').write_text(' '.join(generator.choice(words, 100)) + '\n')
  return f'{folder}/*.txt'


def start(script: str, *arguments: str, **options) -> subprocess.Popen:
  """Starts a script in a process of its own, with one host device."""
  environ = {**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
  return subprocess.Popen(
    [sys.executable, f'scripts/{script}.py', *arguments],
    cwd=ROOT,
    env=environ,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    **options,
  )


def finish(process: subprocess.Popen, code: int = 0) -> str:
  """Waits for a script and returns what it printed."""
  output, _ = process.communicate(timeout=400)
  assert process.returncode == code, output
  assert 'Traceback' not in output, output
  return output


def arguments(text: str, cache: pathlib.Path, workdir: pathlib.Path, *more: str) -> list[str]:
  """The command line of a small run on the reader's own text."""
  source = f'--config.data.source=TextFiles("{text}")'
  return [*SMALL, source, f'--cache_dir={cache}', f'--workdir={workdir}', *more]


def logged(workdir: pathlib.Path) -> list[dict]:
  """The log's rows without what depends on the clock."""
  rows = JsonLines(workdir / 'metrics.jsonl').read()
  return [{key: value for key, value in row.items() if key not in CLOCKED} for row in rows]


@pytest.mark.slow
def test_own_text_from_training_to_a_continuation(text, tmp_path, cache_dir):
  workdir = tmp_path / 'run'
  command = arguments(text, cache_dir, workdir, '--config.prompts=("we hold",)')
  output = finish(start('train', *command))
  assert 'step 20/20' in output
  assert 'sample: we hold' in output
  assert f'checkpoint: {workdir}/checkpoints/20' in output
  assert f'report: {workdir}/report.html' in output
  page = (workdir / 'report.html').read_text()
  assert 'Finished: step 20 of 20' in page
  for what in ('we hold', jax.__version__, 'data.length', 'prompts'):
    assert what in page, what
  output = finish(start('evaluate', f'--workdir={workdir}', f'--cache_dir={cache_dir}'))
  assert 'tiny_mla, step 20' in output
  for yardstick in ('gzip -9', 'xz -9e', 'unigram', 'bigram', '5-gram'):
    assert yardstick in output
  assert (workdir / 'yardsticks.json').exists()
  output = finish(start('generate', f'--workdir={workdir}', '--prompt=we hold', '--tokens=8'))
  assert 'we hold' in output


def test_killed_and_resumed_is_uninterrupted_bitwise(text, tmp_path, cache_dir):
  """2N steps equal N steps, `kill -9`, and N steps: losses and parameters, bit for bit."""
  more = ('--config.train_steps=300', '--config.cadence.save=20', '--config.cadence.keep=1')
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  finish(start('train', *arguments(text, cache_dir, whole, *more)))
  process = start('train', *arguments(text, cache_dir, killed, *more))
  deadline = time.time() + 300
  log = JsonLines(killed / 'metrics.jsonl')
  while (Checkpoints(killed / 'checkpoints').latest() or 0) < 60:
    assert process.poll() is None
    assert time.time() < deadline
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  reached = max(row['step'] for row in log.read())
  saved = Checkpoints(killed / 'checkpoints').latest()
  assert saved is not None
  assert 60 <= saved <= reached < 300
  output = finish(start('train', *arguments(text, cache_dir, killed, *more)))
  assert f'going on after step {saved}' in output
  assert [row['step'] for row in logged(killed)] == list(range(1, 301))
  assert logged(killed) == logged(whole)
  events = [(row['step'], row['event']) for row in JsonLines(killed / 'events.jsonl').read()]
  assert events == [(0, 'started'), (saved, 'resumed'), (300, 'finished')]
  assert 'no end was noted before the next start' in (killed / 'report.html').read_text()
  left, right = (restore_params(path / 'checkpoints')[0] for path in (whole, killed))
  addresses = _leaves(left)
  assert len(addresses) > 20
  for address, leaf in addresses.items():
    np.testing.assert_array_equal(leaf, _leaves(right)[address], err_msg=address)


def _leaves(tree: dict, prefix: str = '') -> dict[str, np.ndarray]:
  found = {}
  for key, value in tree.items():
    inner = _leaves(value, f'{prefix}{key}/') if isinstance(value, dict) else {prefix + key: value}
    found.update(inner)
  return found


@pytest.mark.parametrize('moment', ['reading', 'compiling'])
def test_sigterm_before_the_first_step_exits_clean(moment, text, tmp_path, cache_dir):
  process = start('train', *arguments(text, cache_dir, tmp_path / 'run', '--config.model.depth=3'))
  assert process.stdout is not None
  for line in process.stdout:
    if moment in line:
      break
  process.send_signal(signal.SIGTERM)
  output = finish(process)
  assert 'nothing to save' in output
  assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_a_dry_run_says_what_would_be(text, tmp_path, cache_dir):
  workdir = tmp_path / 'never'
  output = finish(start('train', *arguments(text, cache_dir, workdir, '--dry_run')))
  for words in ('train_steps=20', 'MLA + MoE', 'training FLOPs a token', 'peak of the step',
                'head/weight', '(8, 32)', 'all checks passed'):  # fmt: skip
    assert words in output, words
  assert not workdir.exists()


def test_every_config_error_is_reported_at_once(tmp_path):
  output = finish(
    start(
      'train',
      '--config=tiny_mla',
      '--config.model.depht=2',
      '--config.train_steps=2.5',
      '--config.model.attention=Linear()',
      f'--workdir={tmp_path / "run"}',
    ),
    code=2,
  )
  assert 'has no field `depht`; did you mean `depth`?' in output
  assert "'2.5' is not int" in output
  assert '`Linear` is not one of [MLA, MHA, Window, Gated, TopK, DSA, ' in output
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (['--config.model.vocab=100'], 'fewer than the 259 tokens'),
    (['--config.mesh.model=3'], 'mesh'),
    (['--config.schedule.warmup_steps=50'], 'warmup_steps=50'),
    (['--config.data.source=TextFiles("/nowhere/*.txt")'], '/nowhere'),
    (['--config.microbatches=3'], 'does not divide'),
    (['--nonsense=1'], 'nonsense'),
  ],
)
def test_one_clear_message_and_nothing_written(changes, message, tmp_path, cache_dir):
  workdir = tmp_path / 'run'
  command = [*SMALL, f'--cache_dir={cache_dir}', f'--workdir={workdir}', *changes]
  assert message in finish(start('train', *command), code=2)
  assert not (workdir / 'checkpoints').exists()


@pytest.mark.slow
def test_a_workdir_of_another_model_is_refused(text, tmp_path, cache_dir):
  workdir = tmp_path / 'run'
  finish(start('train', *arguments(text, cache_dir, workdir)))
  before = (workdir / 'config.json').read_bytes()
  command = arguments(text, cache_dir, workdir, '--config.model.width=64')
  output = finish(start('train', *command), code=2)
  assert 'model.width: 32 → 64' in output
  assert (workdir / 'config.json').read_bytes() == before


@pytest.mark.parametrize('script', ['train', 'evaluate', 'generate', 'inspect_config'])
def test_help_is_short_and_fast(script):
  begin = time.perf_counter()
  output = finish(start(script, '--help'))
  assert time.perf_counter() - begin < 20
  assert f'scripts/{script}.py' in output
  assert len(output.splitlines()) < 30


def test_inspect_config_needs_no_device():
  output = finish(start('inspect_config', '--config=v3_671b'))
  assert '58×256×7168×2048' in output
