"""The script that continues texts, as a user calls it."""

import os
import pathlib
import subprocess
import sys

import pytest

from deepseek_jax.hub import from_pretrained
from deepseek_jax.infer.sample import Greedy

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments, text=''):
  """Calls the script; returns exit code, output and errors."""
  environ = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  command = [sys.executable, str(ROOT / 'scripts' / 'generate.py'), *arguments]
  result = subprocess.run(
    command, input=text.encode(), capture_output=True, env=environ, check=False, timeout=300
  )
  return result.returncode, result.stdout.decode(), result.stderr.decode()


@pytest.mark.slow
def test_prompts_are_continued(workdir):
  """Several from the command line; one from standard input."""
  generator = from_pretrained(workdir).generator
  prompts = ['The ', 'naïve']
  free = generator.complete(prompts, max_new_tokens=9, sampler=Greedy())
  flags = (f'--workdir={workdir}', '--tokens=9', '--greedy')
  code, output, errors = run(*flags, *(f'--prompt={prompt}' for prompt in prompts))
  assert (code, output) == (0, f'The {free[0]}\n\nnaïve{free[1]}\n')
  assert '18 tokens, ' in errors
  code, output, errors = run(*flags, text='The \n')
  assert (code, output) == (0, f'The {free[0]}\n')
  assert '9 tokens, ' in errors


def test_drafts_need_modules(workdir):
  """A run that was trained without them is refused."""
  code, _, errors = run(f'--workdir={workdir}', '--speculate', '--prompt=x')
  assert code == 2
  assert 'error: speculative decoding drafts with' in errors


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ((), 'error: --workdir is missing'),
    (('--workdir={folder}', '--prompt=x'), 'error: {folder}: holds no checkpoint'),
    (('--workdir={folder}', '--temperature=0', '--prompt=x'), 'error: Sample.temperature: found 0'),
    (('--workdir={folder}', '--tokens=many'), 'error: flag --tokens=many'),
    (('--wokdir={folder}',), 'wokdir'),
  ],
)
def test_a_mistake_is_one_message(tmp_path, flags, message):
  """And exit code 2, without a traceback."""
  code, output, errors = run(*(flag.format(folder=tmp_path) for flag in flags))
  assert (code, output) == (2, '')
  assert message.format(folder=tmp_path) in errors
  assert 'Traceback' not in errors


def test_help_is_short():
  """And quick, since it starts no JAX."""
  code, output, _ = run('--help')
  assert code == 0
  assert '--workdir=DIR' in output
  assert len(output.splitlines()) < 25
