"""What is read back from a run's folder, and how curves are made of it."""

import math

import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.train.history import (
  column,
  layer_column,
  load_table,
  loss_key,
  read_history,
  shown_range,
  smooth,
  thin,
  wall_clock,
)


def test_a_run_is_read_whole(write_run):
  history = read_history(write_run('run', faults=[{'step': 3, 'kind': 'spike'}]))
  assert history.step == 20
  assert history.experiment.name == history.name == 'tiny_mla'
  assert history.faults == [{'step': 3, 'kind': 'spike'}]
  assert history.problems == ()
  assert history.samples == []


def test_what_is_absent_or_broken_is_said(write_run, tmp_path):
  path = write_run('run')
  (path / 'config.json').unlink()
  (path / 'faults.jsonl').write_bytes(b'\xff\xfe\n')
  history = read_history(path)
  assert history.experiment is None
  assert history.name == 'run'
  assert len(history.problems) == 2
  with pytest.raises(ConfigError, match='no run here'):
    read_history(tmp_path / 'empty')


def test_columns_are_numbers_or_nan():
  rows = [{'a': 1, 'b': [1, 3]}, {'a': None, 'b': None}, {'a': 'x', 'b': [None, 2.0]}, {}]
  np.testing.assert_array_equal(column(rows, 'a'), [1, math.nan, math.nan, math.nan])
  np.testing.assert_array_equal(layer_column(rows, 'b'), [3, math.nan, 2, math.nan])
  np.testing.assert_array_equal(layer_column(rows, 'b', np.mean), [2, math.nan, 2, math.nan])
  assert loss_key([{'loss': 1, 'bits_per_byte': None}]) == 'loss'
  assert loss_key([{'loss': 1, 'bits_per_byte': 2}]) == 'bits_per_byte'


@pytest.mark.parametrize('window', [1, 2, 3, 8, 50])
def test_smoothing_is_the_mean_of_finite_neighbours(window):
  values = np.random.default_rng(0).normal(size=17)
  values[[0, 5, 6, 7]] = math.nan, math.inf, math.nan, -math.inf
  found = smooth(values, window)
  size = min(window, len(values))
  for at in range(len(values)):
    first = at - size // 2
    part = values[max(0, first) : first + size]
    known = [x for x in part if math.isfinite(x)]
    expected = sum(known) / len(known) if known else math.nan
    np.testing.assert_allclose(found[at], expected, equal_nan=True)


def test_thinning_keeps_the_ends_the_peaks_and_the_gaps():
  x = np.arange(10_000.0)
  y = np.sin(x / 50)
  y[1234], y[4321] = 99.0, -99.0
  y[6000:6500] = math.nan
  thin_x, thin_y = thin(x, y, 400)
  assert 200 < len(thin_x) < 500
  assert (thin_x[0], thin_x[-1]) == (0, 9999)
  assert (np.nanmax(thin_y), np.nanmin(thin_y)) == (99, -99)
  inside = (thin_x >= 6000) & (thin_x < 6500)
  assert inside.any()
  assert np.isnan(thin_y[inside]).all()
  assert (np.diff(thin_x) > 0).all()
  np.testing.assert_array_equal(y[thin_x.astype(int)], thin_y)
  assert thin(x[:5], y[:5], 400)[0] is not None


def test_the_first_steps_do_not_set_the_range():
  curve = np.concatenate([[50.0, 20.0], np.linspace(2, 1, 98)])
  low, high = shown_range([curve], [2.5])
  assert 0.8 < low < 1
  assert 2.5 < high < 2.8
  assert shown_range([np.array([math.nan])], []) == (0, 1)


def test_loads_are_relative_to_an_equal_share():
  rows = [
    {'step': 1, 'load': {'layers/10': [0.5, 0.5, 0.0, 0.0], 'layers/9': [0.25, 0.75]}},
    {'step': 2},
    {'step': 3, 'load': {'layers/9': [1.0, None]}},
  ]
  layers, steps, table = load_table(rows)
  assert layers == ['layers/9', 'layers/10']
  assert steps.tolist() == [1, 3]
  nan = math.nan
  np.testing.assert_array_equal(table[0], [[0.5, 2.0], [1.5, nan], [nan, nan], [nan, nan]])
  np.testing.assert_array_equal(table[1], [[2, nan], [2, nan], [0, nan], [0, nan]])


def test_the_clock_runs_on_over_a_resume():
  rows = [{'elapsed_seconds': x} for x in (1.0, 5.0, None, 2.0, 4.0)]
  np.testing.assert_array_equal(wall_clock(rows), [1, 5, math.nan, 7, 9])
