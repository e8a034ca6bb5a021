"""Every table and picture of a write-up is what its committed results say."""

import pathlib

import pytest

from deepseek_jax.lab.question import read_question
from deepseek_jax.lab.results import read_results
from deepseek_jax.lab.sweep_pictures import pictures
from deepseek_jax.lab.write_up import fill

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = sorted(path.parent for path in ROOT.glob('experiments/*/results.json'))


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
def test_pictures_are_there_and_shown(folder):
  """As many as the results have; each is in the write-up."""
  text = (folder / 'README.md').read_text(encoding='utf-8')
  for name in pictures(read_results(folder / 'results.json')):
    assert (folder / f'{name}.svg').exists()
    assert (folder / f'{name}.png').exists()
    assert f'({name}.png)' in text
