"""Every table and picture of a write-up is what its committed results say."""

import hashlib
import pathlib

import pytest
from PIL import Image

from deepseek_jax.lab.question import read_question
from deepseek_jax.lab.results import read_results
from deepseek_jax.lab.sweep_pictures import drawn_from, pictures
from deepseek_jax.lab.write_up import fill

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = sorted(path.parent for path in ROOT.glob('experiments/*/results.json'))


def test_the_experiments_are_found():
  assert {folder.name for folder in FOLDERS} >= {'balance_kinds', 'ladder', 'mtp', 'sparsity'}


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda folder: folder.name)
def test_tables_come_out_of_the_results(folder):
  """If not: scripts/sweep_report.py --results=experiments/<question>/results.json --readme."""
  text = (folder / 'README.md').read_text(encoding='utf-8')
  assert fill(text, read_results(folder / 'results.json')) == text


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda folder: folder.name)
def test_results_are_those_of_the_question(folder):
  """The file of the question, as it is now, asks for the variants and seeds that were run."""
  question = read_question(folder / 'sweep.py', ROOT)
  results = read_results(folder / 'results.json')
  assert results.baseline == question.baseline
  assert list(results.variants) == [variant.name for variant in question.variants]
  for variant in question.variants:
    found = results.variants[variant.name]
    assert found.asked_steps == variant.config.train_steps
    assert set(found.runs) == set(question.seeds)


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda folder: folder.name)
def test_pictures_are_of_the_results_and_shown(folder):
  """As many as the results have; each says that it was drawn from them, and is in the write-up."""
  text = (folder / 'README.md').read_text(encoding='utf-8')
  results = read_results(folder / 'results.json')
  source = drawn_from(results)
  file_digest = hashlib.sha256((folder / 'results.json').read_bytes()).hexdigest()
  assert source.endswith(file_digest)
  for name in pictures(results):
    svg = (folder / f'{name}.svg').read_text(encoding='utf-8')
    assert f'<dc:description>{source}</dc:description>' in svg
    with Image.open(folder / f'{name}.png') as picture:
      assert picture.info['Description'] == source
    assert f'({name}.png)' in text
