"""The script that converts runs and published folders, as a user calls it."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from deepseek_jax.convert.export import SUMS
from deepseek_jax.hub import from_pretrained

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments):
  """Calls the script; returns exit code and errors."""
  environ = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  command = [sys.executable, str(ROOT / 'scripts' / 'convert.py'), *arguments]
  result = subprocess.run(command, capture_output=True, env=environ, check=False, timeout=300)
  return result.returncode, result.stderr.decode()


def test_a_run_becomes_a_folder_and_a_checkpoint(workdir, tmp_path):
  """Bit by bit; a file that was changed on the way is refused."""
  out, back = tmp_path / 'exported', tmp_path / 'imported'
  code, errors = run(f'--from={workdir}', '--to=huggingface', f'--out={out}', '--step=9')
  assert code == 0, errors
  assert 'tiny at step 9' in errors
  assert (out / SUMS).is_file()
  code, errors = run(f'--from={out}', '--to=checkpoint', f'--out={back}')
  assert code == 0, errors
  want, found = from_pretrained(workdir, step=9), from_pretrained(back)
  ids = [5, 6, 7, 200]
  np.testing.assert_allclose(found.logits(ids), want.logits(ids), rtol=0, atol=1e-6)
  manifest = json.loads((back / 'manifest.json').read_text())
  assert manifest['bytes'] == sum(x.nbytes for x in jax.tree.leaves(found.variables))
  assert len(manifest['read']) > 10
  (out / 'config.json').write_text((out / 'config.json').read_text() + ' ')
  code, errors = run(f'--from={out}', '--to=checkpoint', f'--out={tmp_path / "never"}')
  assert code == 2
  assert 'config.json: differs from its checksum' in errors
  assert not (tmp_path / 'never').exists()


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ((), '--from is missing\n- --to is missing'),
    (('--from={folder}', '--to=huggingface', '--out=x'), 'error: {folder}: holds no checkpoint'),
    (('--from={folder}', '--to=onnx', '--out=x'), 'error: flag --to=onnx'),
  ],
)
def test_a_mistake_is_one_message(tmp_path, flags, message):
  """And exit code 2, without a traceback."""
  code, errors = run(*(flag.format(folder=tmp_path) for flag in flags))
  assert code == 2
  assert message.format(folder=tmp_path) in errors
  assert 'Traceback' not in errors
