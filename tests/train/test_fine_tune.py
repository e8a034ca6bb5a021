"""A small model learns to complete from another's weights; prompts steer it and cost nothing."""

import json
import pathlib

import jax
import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.core.override import override
from deepseek_jax.data.pairs import Pairs
from deepseek_jax.data.source import TextFiles
from deepseek_jax.hub import from_pretrained
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.display import QuietDisplay
from deepseek_jax.train.init_from import InitFrom
from deepseek_jax.train.loop import train
from deepseek_jax.train.metrics import JsonLines
from deepseek_jax.train.workdir import Workdir

# Trains three models; what each part does is tested in test_initialise.py and data/test_pairs.py.
pytestmark = pytest.mark.slow

WORDS = ('amber', 'birch', 'cedar', 'delta', 'ember', 'fjord', 'grove', 'heath')


class Heard(QuietDisplay):
  """Remembers what it was told."""

  def __init__(self):
    self.texts: list[str] = []

  def message(self, text):
    self.texts.append(text)


def run(path: pathlib.Path, cache: pathlib.Path, **changes) -> Heard:
  """Trains a model of three layers in a folder."""
  base = {'model.mtp': None, 'data.length': 32, 'cadence.evaluate': None}
  config = override(tiny_mla.get_config(), {**base, **changes})[0]
  workdir, display = Workdir(path), Heard()
  workdir.write(config)
  train(config, workdir, cache, display)
  return display


def first_loss(path: pathlib.Path) -> float:
  return JsonLines(path / 'metrics.jsonl').read()[0]['loss']


@pytest.fixture(scope='module')
def base(tmp_path_factory, cache_dir) -> pathlib.Path:
  """A run on plain text that knows the words."""
  folder = tmp_path_factory.mktemp('base')
  noise = np.random.default_rng(0)
  for number in range(60):
    text = ' '.join(noise.choice(WORDS, 40))
    (folder / f'{number}.txt').write_text(text + '\n')
  run(
    folder / 'run', cache_dir,
    **{'data.source': TextFiles(f'{folder}/*.txt'), 'train_steps': 60},
  )  # fmt: skip
  return folder / 'run'


def test_completions_are_learnt_from_a_checkpoint(base, tmp_path, cache_dir):
  """The completion is the prompt's first letter, doubled: half the pairs are held out."""
  noise = np.random.default_rng(1)
  rows = []
  for _ in range(400):
    word = str(noise.choice(WORDS))
    prompt = f'{word} {noise.choice(WORDS)}{noise.integers(100)}:'
    rows.append({'prompt': prompt, 'completion': word[0] * 2})
  path = tmp_path / 'pairs.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  changes = {
    'data.source': Pairs(str(path), heldout_fraction=0.3),
    'train_steps': 60,
    'cadence.log': 1,
  }
  display = run(tmp_path / 'tuned', cache_dir, init_from=InitFrom(str(base)), **changes)
  assert any(text.startswith(f'begins with {base}/checkpoints/60') for text in display.texts)
  assert json.loads((tmp_path / 'tuned' / 'init_from.json').read_text())['fresh'] == []
  run(tmp_path / 'new', cache_dir, **changes)
  assert first_loss(tmp_path / 'tuned') != first_loss(tmp_path / 'new')
  figures = {
    name: JsonLines(tmp_path / name / 'evaluations.jsonl').read()[-1] for name in ('tuned', 'new')
  }
  # Two letters and the end for two bytes; a guess among eight letters would cost 3 bits.
  assert figures['tuned']['bits_per_byte'] < 1.0
  assert figures['tuned']['bits_per_byte'] < figures['new']['bits_per_byte']
  model = from_pretrained(tmp_path / 'tuned')
  right = sum(
    model.generate(f'{word} {other}42:', max_new_tokens=4) == word[0] * 2
    for word, other in zip(WORDS, WORDS[3:] + WORDS[:3], strict=True)
  )
  assert right >= 6


def test_a_run_that_is_there_goes_on_with_its_own_weights(base, tmp_path, cache_dir):
  source = json.loads((base / 'config.json').read_text())
  assert source['name'] == 'tiny_mla'
  files = TextFiles(str(base.parent / '*.txt'))
  changes = {'data.source': files, 'init_from': InitFrom(str(base))}
  run(tmp_path / 'run', cache_dir, train_steps=8, **changes)
  before = Checkpoints(tmp_path / 'run' / 'checkpoints').latest()
  display = run(tmp_path / 'run', cache_dir, train_steps=12, **changes)
  assert before == 8
  assert not any('begins with' in text for text in display.texts)
  assert any('going on after step 8' in text for text in display.texts)
  losses = [row['loss'] for row in JsonLines(tmp_path / 'run' / 'metrics.jsonl').read()]
  assert jax.tree.all(jax.tree.map(np.isfinite, losses))
