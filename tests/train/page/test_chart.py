"""Line charts: ticks, gaps, scales."""

import itertools
import math
import re

import numpy as np
import pytest

from deepseek_jax.train.page.chart import (
  MOST_POINTS,
  Chart,
  Line,
  draw,
  log_ticks,
  nice_ticks,
  tick_text,
)


def line(y, **fields) -> Line:
  """A line over 0, 1, 2 …"""
  return Line(label='a', x=np.arange(len(y), dtype=np.float64), y=np.array(y, float), **fields)


def drawn(y, **fields) -> str:
  """The path of one line."""
  text = draw(Chart(title='t', unit='u', lines=[line(y)], **fields))
  found = re.search(r'class="line line c0" data-label="a" d="([^"]*)"', text)
  assert found is not None
  return found.group(1)


@pytest.mark.parametrize('seed', range(20))
def test_ticks_are_few_round_and_inside(seed):
  noise = np.random.default_rng(seed)
  low = float(noise.normal() * 10 ** noise.uniform(-6, 7))
  high = low + float(10 ** noise.uniform(-6, 7))
  ticks = nice_ticks(low, high)
  spread = high - low
  assert 2 <= len(ticks) <= 6
  assert all(low - 1e-6 * spread <= tick <= high + 1e-6 * spread for tick in ticks)
  np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0], rtol=1e-3)


@pytest.mark.parametrize(('low', 'high'), [(1e-9, 1e9), (0.4, 5), (3, 4), (1, 1000)])
def test_logarithmic_ticks_are_inside(low, high):
  ticks = log_ticks(low, high)
  assert 2 <= len(ticks) <= 6
  assert all(low <= tick <= high for tick in ticks)


def test_numbers_of_ticks_are_short():
  values = (0, 0.003, 3e-5, 1500, 20_000, 2_500_000, 2.5e10, -4)
  texts = ['0', '0.003', '3e-5', '1500', '20k', '2.5M', '2.5e10', '-4']
  assert [tick_text(value) for value in values] == texts


def test_gaps_are_not_drawn_over():
  path = drawn([1, 2, math.nan, 4, math.inf, 6, 7])
  assert path.count('M') == 3
  assert path.count('L') == 2
  assert 'nan' not in path


def test_a_point_alone_is_a_dot():
  assert 'class="dots c0"' in draw(Chart(title='', unit='', lines=[line([3.0])]))
  assert 'class="dots' not in draw(Chart(title='', unit='', lines=[line([3.0, 4.0])]))


def test_higher_values_are_higher_up():
  for fields in ({}, {'scale': 'log'}, {'y_range': (0.0, 200.0)}):
    heights = [float(y) for y in re.findall(r'[ML][\d.]+ ([\d.]+)', drawn([1, 10, 100], **fields))]
    assert heights == sorted(heights, reverse=True)
    assert len(set(heights)) == 3
    assert all(0 <= height <= 1000 for height in heights)
  heights = [float(y) for y in re.findall(r'[ML][\d.]+ ([\d.]+)', drawn([1, 10, 100], scale='log'))]
  assert math.isclose(heights[0] - heights[1], heights[1] - heights[2], abs_tol=0.2)


def test_a_logarithm_of_nothing_falls_back_to_linear():
  assert 'data-scale="linear"' in draw(
    Chart(title='', unit='', lines=[line([0.0, 10.0])], scale='log')
  )


def test_constant_and_empty_lines():
  for value in (0.0, 5.0, -5.0):
    assert 'NaN' not in draw(Chart(title='', unit='', lines=[line([value] * 3)]))
  assert 'no finite value' in draw(Chart(title='', unit='', lines=[line([math.nan])]))


def test_long_lines_are_thinned():
  path = drawn(np.random.default_rng(0).normal(size=20_000))
  assert MOST_POINTS / 2 < path.count('L') <= MOST_POINTS + 3


def test_names_of_levels_keep_apart():
  levels = {'x': 1.0, 'y': 1.001, 'z': 1.002, 'w': 3.0}
  text = draw(Chart(title='', unit='', lines=[line([1.0, 3.0])], levels=levels))
  tops = [float(top) for top in re.findall(r'class="name" style="top:([\d.-]+)%', text)]
  assert len(tops) == 4
  assert all(a - b > 6 for a, b in itertools.pairwise(tops))
  assert text.count('class="level"') == 4


def test_what_cannot_be_seen_is_said():
  text = draw(Chart(title='Loss', unit='nats', lines=[line([4.0, 1.0, 2.0])]))
  assert 'aria-label="Loss, nats. a: 4 at step 0, 2 at 2, lowest 1, highest 4"' in text
