"""Every run of a sweep is measured, and no measure is lost."""

import argparse
import json

import pytest

from experiments import reading


def measure(folder, given):
  """A line, two for the second variant, whose second seed fails."""
  yield {'twice': given.number * 2}
  if folder.parent.name == 'b':
    if folder.name == 'seed_1':
      raise RuntimeError('broken')
    yield {'variant': 'b, again', 'twice': 0}


def read(*arguments):
  """What is shown."""
  shown = []

  def show(rows, out):
    shown.append((rows, out))
    return f'{len(rows)} rows'

  parser = argparse.ArgumentParser()
  parser.add_argument('--number', type=int, default=3)
  reading.main(parser, measure, show, list(map(str, arguments)))
  return shown[0]


@pytest.fixture
def runs(tmp_path):
  """Two variants of one seed."""
  for variant in ('b', 'a'):
    (tmp_path / variant / 'seed_0').mkdir(parents=True)
  return tmp_path


def test_rows(runs, tmp_path, capsys):
  """By variant and seed, in order; kept, printed, and shown again from the file."""
  want = [
    {'variant': 'a', 'seed': 0, 'twice': 10},
    {'variant': 'b', 'seed': 0, 'twice': 10},
    {'variant': 'b, again', 'seed': 0, 'twice': 0},
  ]
  assert read('--runs', runs, '--number', 5) == (want, runs)
  kept = (runs / 'rows.jsonl').read_text()
  assert [json.loads(line) for line in kept.splitlines()] == want
  assert capsys.readouterr().out == kept + '3 rows\n'
  other = tmp_path / 'other'
  assert read('--rows', runs / 'rows.jsonl', '--out', other) == (want, other)
  with pytest.raises(SystemExit, match=r'rows\.jsonl: is there; show it with --rows'):
    read('--runs', runs)
  assert (runs / 'rows.jsonl').read_text() == kept


def test_what_was_measured_is_kept(runs):
  (runs / 'b' / 'seed_1').mkdir()
  with pytest.raises(RuntimeError, match='broken'):
    read('--runs', runs)
  assert len((runs / 'rows.jsonl').read_text().splitlines()) == 4


def test_wrong_arguments(tmp_path):
  with pytest.raises(SystemExit, match='expected either --runs or --rows'):
    read()
  with pytest.raises(SystemExit, match=r'no run here; run sweep\.py first'):
    read('--runs', tmp_path)
  assert not list(tmp_path.iterdir())
