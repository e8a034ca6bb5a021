"""Runs scripts in this process as the command line would, and makes a folder of spoilt files."""

import dataclasses
import gzip
import json
import pathlib
import runpy
import sys
from collections.abc import Callable

import jax
import numpy as np
import pytest
from absl import flags

from configs import tiny_mla
from deepseek_jax.core.serialise import to_json
from deepseek_jax.data.source import TextFiles
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.step import build_program
from deepseek_jax.train.workdir import Workdir

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = {
  'raises': 'def get_config():\n  return 1 / 0\n',
  'refuses': 'from configs import tiny_mla\nfrom deepseek_jax.layers.moe.moe import MoE\n\n\n'
  'def get_config():\n  return MoE(experts=2, top_k=3, hidden=4)\n',
  'nothing': 'def get_konfig():\n  return None\n',
  'a_dict': 'def get_config():\n  return {"depth": 3}\n',
  'a_part': 'from deepseek_jax.optim.optimizer import AdamW\n\n\n'
  'def get_config():\n  return AdamW(peak_lr=1e-3)\n',
  'syntax': 'def get_config():\n  return Experiment(\n',
  'imports': 'import no_such_module_at_all\n',
  'exits': 'import sys\n\n\ndef get_config():\n  sys.exit(0)\n',
}


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a script left behind."""

  code: int
  output: str
  errors: str


@pytest.fixture
def run_script(capfd, monkeypatch) -> Callable[..., Outcome]:
  """Runs `scripts/<name>.py` with arguments through its own `__main__`, with flags of its own."""

  def run(name: str, *arguments: str) -> Outcome:
    path = str(ROOT / 'scripts' / f'{name}.py')
    monkeypatch.setattr(sys, 'argv', [path, *arguments])
    monkeypatch.chdir(ROOT)
    # Flags that another test's import of a script defined would be defined twice.
    kept = _take_script_flags()
    capfd.readouterr()
    try:
      with pytest.raises(SystemExit) as caught:
        runpy.run_path(path, run_name='__main__')
    finally:
      _take_script_flags()
      for flag, value in kept.items():
        flags.FLAGS[flag] = value
      flags.FLAGS.unparse_flags()
    printed = capfd.readouterr()
    return Outcome(int(caught.value.code or 0), printed.out, printed.err)

  return run


def _take_script_flags() -> dict[str, flags.Flag]:
  """Takes away the flags that scripts have defined, and returns them."""
  taken = {}
  for flag in list(flags.FLAGS):
    module = flags.FLAGS.find_module_defining_flag(flag) or ''
    if not module.startswith(('absl.', 'pytest')):
      taken[flag] = flags.FLAGS[flag]
      delattr(flags.FLAGS, flag)
  return taken


def small(world: pathlib.Path) -> Experiment:
  """A run of a moment: one dense layer on the spoilt folder's only good text."""
  base = tiny_mla.get_config()
  model = dataclasses.replace(
    base.model, depth=2, width=16, mtp=None, dense=SwiGLU(hidden=8), dense_layers=2
  )
  data = dataclasses.replace(
    base.data, source=TextFiles(str(world / 'text/good.txt')), length=16, batch_size=8
  )
  return dataclasses.replace(base, name='small', model=model, data=data, train_steps=20)


def write_run(
  folder: pathlib.Path, experiment: Experiment, saved: Experiment | None = None
) -> None:
  """Writes a run's folder with a checkpoint of zeros, after its first step."""
  workdir = Workdir(folder)
  workdir.write(experiment)
  program = build_program(saved or experiment)
  state = jax.tree.map(
    lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding),
    program.abstract_state,
  )
  with Checkpoints(workdir.checkpoints) as checkpoints:
    checkpoints.save(1, state, {'step': 1}, to_json(experiment))


@pytest.fixture(scope='session')
def world(tmp_path_factory) -> pathlib.Path:
  """A folder of spoilt files; no script may change a byte of it."""
  folder = tmp_path_factory.mktemp('world')
  (folder / 'configs').mkdir()
  for name, text in CONFIGS.items():
    (folder / 'configs' / f'{name}.py').write_text(text)
  (folder / 'configs/binary.py').write_bytes(bytes(range(256)))
  _write_texts(folder / 'text')
  _write_tokenizers(folder / 'tokenizers')
  _write_workdirs(folder)
  return folder


def _write_texts(folder: pathlib.Path) -> None:
  folder.mkdir()
  words = 'we hold these truths to be self evident that all men are created equal\n'
  content = {
    'good.txt': (words * 40).encode(),
    'empty.txt': b'',
    'blank.txt': b' \n\t\n',
    'binary.txt': b'text \0 and more' * 9,
    'latin.txt': 'où est le café'.encode('latin-1'),
    'utf16.txt': words.encode('utf-16'),
    'letter.txt': b'a',
    'cut.txt.gz': gzip.compress(words.encode() * 99)[:-30],
    'not.txt.xz': b'this is no xz file',
    'table.csv': b'a,b\n1,2\n',
    'broken.jsonl': b'{"text": "one"}\n{"text": "two"\n',
    'huge.jsonl': b'{"text": "one"}\n{"text": "' + b'x' * 3_000_000 + b'\n',
    'keys.jsonl': b'{"txet": "one"}\n',
    'list.jsonl': b'["one"]\n',
    'number.jsonl': b'{"text": 3}\n',
    'surrogate.jsonl': b'{"text": "\\ud800"}\n',
    'deep.jsonl': b'{"text": ' + b'[' * 100_000 + b'\n',
    'no_text.jsonl': b'\n\n',
    'no_answer.jsonl': b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": ""}\n',
    'number_prompt.jsonl': b'{"prompt": 3, "completion": "b"}\n',
    'same/1.txt': b'the same',
    'same/2.txt': b'the same',
  }
  (folder / 'same').mkdir()
  for name, data in content.items():
    (folder / name).write_bytes(data)


def _write_tokenizers(folder: pathlib.Path) -> None:
  folder.mkdir()
  whole = json.loads((ROOT / 'deepseek_jax/data/corpus/bpe_8192.json').read_text())
  (folder / 'whole.json').write_text(json.dumps(whole))
  (folder / 'cut.json').write_text(json.dumps(whole)[:5000])
  (folder / 'other.json').write_text('{"a": 1}')
  (folder / 'binary.json').write_bytes(bytes(range(256)))
  (folder / 'empty.json').write_bytes(b'')


def _write_workdirs(folder: pathlib.Path) -> None:
  experiment = small(folder)
  runs = folder / 'runs'
  write_run(runs / 'good', experiment)
  write_run(runs / 'cut', experiment)
  for path in (runs / 'cut/checkpoints/1').rglob('*'):
    if path.is_file() and path.stat().st_size > 300 and 'state' in path.parts:
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  wider = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, width=24))
  write_run(runs / 'other_weights', experiment, saved=wider)
  Workdir(runs / 'unstarted').write(experiment)
  contents = {
    'not_json': '{"name": ',
    'no_experiment': '{"type": "AdamW"}',
    'a_list': '[1, 2]',
    'older': json.dumps(to_json(experiment)).replace('"microbatches"', '"micro_batches"'),
    'binary': None,
  }
  for name, text in contents.items():
    (runs / name).mkdir()
    data = bytes(range(256)) if text is None else text.encode()
    (runs / name / 'config.json').write_bytes(data)
  (runs / 'foreign').mkdir()
  (runs / 'foreign/holiday.jpg').write_bytes(b'JFIF')
  (runs / 'a_file').write_text('something')
  (runs / 'nowhere').symlink_to(folder / 'not/there')
