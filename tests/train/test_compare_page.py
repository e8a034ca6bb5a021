"""Runs beside each other."""

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.train.compare_page import compare_page, compare_text, config_rows, read_runs


def pair(write_run):
  """Two runs that differ in two fields, a kind, and how far they got."""
  one = write_run('one', evaluations=[{'step': 20, 'bits_per_byte': 2.0}])
  two = write_run(
    'two',
    rows=10,
    changes={'optimizer.peak_lr': 0.5, 'model.depth': 5, 'model.mtp': None},
    evaluations=[{'step': 10, 'bits_per_byte': 1.5}],
  )
  return read_runs([one, two])


def test_the_configs_differ_where_they_do(write_run):
  rows = config_rows(pair(write_run))
  assert [row[0] for row in rows] == ['model.depth', 'model.mtp', 'optimizer.peak_lr']
  by_path = {path: values for path, *values in rows}
  assert by_path['model.depth'][1] == '5'
  assert by_path['model.mtp'][0].startswith('MTP(')
  assert by_path['model.mtp'][1] == 'None'


def test_a_field_of_a_kind_that_another_run_has_not(write_run):
  paths = [
    write_run('one'),
    write_run('two', changes={'model.mtp.depth': 2}),
    write_run('three', changes={'model.mtp': None}),
  ]
  rows = {row[0]: row[1:] for row in config_rows(read_runs(paths))}
  assert rows['model.mtp.depth'] == ('1', '2', '—')


def test_the_text_says_the_figures_and_their_difference(write_run):
  text = compare_text(pair(write_run))
  for words in ('one: Finished', 'two: Not finished: step 10 of 20', 'model.depth', '2.0000',
                '1.5000 (-25.00%)', '10 (-50.00%)', '1,010', 'faults'):  # fmt: skip
    assert words in text, words


def test_equal_runs_are_said_to_be_equal(write_run):
  text = compare_text(read_runs([write_run('one'), write_run('two')]))
  assert 'the configs are equal' in text
  assert text.count(' (=)') >= 5


def test_the_page_has_every_run_in_every_chart(write_run):
  text = compare_page(pair(write_run))
  assert text.count('data-label="one"') == text.count('data-label="two"') >= 7
  assert 'hours of training' in text
  assert 'They are equal' not in text
  assert len(text) < 200_000


def test_names_tell_runs_apart(write_run):
  runs = read_runs([write_run('a/run'), write_run('b/run')])
  assert runs.names == ('a/run', 'b/run')


def test_runs_without_a_log_are_compared_as_far_as_they_go(write_run):
  runs = read_runs([write_run('one', rows=0), write_run('two', rows=1)])
  assert 'Nothing is logged yet' in compare_text(runs)
  assert 'data-label="two"' in compare_page(runs)


def test_without_bits_per_byte_everywhere_losses_are_compared(write_run):
  one, two = write_run('one'), write_run('two')
  log = (two / 'metrics.jsonl').read_text().replace('bits_per_byte', 'other')
  (two / 'metrics.jsonl').write_text(log)
  assert read_runs([one, two]).key == 'loss'
  assert 'nats per token' in compare_text(read_runs([one, two]))


def test_what_cannot_be_compared_is_an_error(write_run, tmp_path):
  one = write_run('one')
  for paths, message in (
    ([one, one], 'twice'),
    ([one, tmp_path / 'none'], 'no run here'),
    ([one] * 7, 'at most'),
  ):
    with pytest.raises(ConfigError, match=message):
      read_runs(paths)
