"""A small model learns to complete from another's weights; prompts steer it and cost nothing."""

import json
import pathlib

import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.core.override import override
from deepseek_jax.data.pairs import Pairs
from deepseek_jax.data.source import TextFiles
from deepseek_jax.hub import from_pretrained
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
  """Trains a model of two layers in a folder."""
  base = {'model.depth': 2, 'model.mtp': None, 'data.length': 32, 'cadence.evaluate': None}
  config = override(tiny_mla.get_config(), {**base, **changes})[0]
  workdir, display = Workdir(path), Heard()
  workdir.write(config)
  train(config, workdir, cache, display)
  return display


def losses(path: pathlib.Path) -> list[float]:
  """Training loss of every step, in nats a token."""
  return [row['loss'] for row in JsonLines(path / 'metrics.jsonl').read()]


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
    **{'data.source': TextFiles(f'{folder}/*.txt'), 'train_steps': 80},
  )  # fmt: skip
  return folder / 'run'


def test_completions_are_learnt_from_a_checkpoint(base, tmp_path, cache_dir):
  """The completion is the prompt's first word; the base knows how words are spelt."""
  noise = np.random.default_rng(1)
  rows = []
  for _ in range(400):
    word = str(noise.choice(WORDS))
    rows.append({'prompt': f'{word} {noise.integers(100)}: ', 'completion': word})
  path = tmp_path / 'pairs.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  source = Pairs(str(path), heldout_fraction=0.3)
  changes = {'data.source': source, 'train_steps': 40, 'cadence.log': 1}
  display = run(tmp_path / 'tuned', cache_dir, init_from=InitFrom(str(base)), **changes)
  assert any(text.startswith(f'begins with {base}/checkpoints/80') for text in display.texts)
  assert json.loads((tmp_path / 'tuned' / 'init_from.json').read_text())['fresh'] == []
  run(tmp_path / 'new', cache_dir, **changes)
  first, new = losses(tmp_path / 'tuned'), losses(tmp_path / 'new')
  # A new model guesses among all bytes, 5.6 nats; the base is right about most letters of a word.
  assert first[0] < new[0] - 1
  assert np.mean(first[:5]) < np.mean(new[:5])
  # Five letters and the end: a guess among eight words is 3 bits for five bytes.
  row = JsonLines(tmp_path / 'tuned' / 'evaluations.jsonl').read()[-1]
  assert row['bits_per_byte'] < 0.6
  model = from_pretrained(tmp_path / 'tuned')
  right = sum(model.generate(f'{word} 42: ', max_new_tokens=8) == word for word in WORDS)
  assert right >= 5
  # The run that is there goes on with its own weights.
  display = run(
    tmp_path / 'tuned', cache_dir, init_from=InitFrom(str(base)), **changes | {'train_steps': 44}
  )
  assert any('going on after step 40' in text for text in display.texts)
  assert not any('begins with' in text for text in display.texts)
  assert losses(tmp_path / 'tuned')[40] < first[0] / 4
