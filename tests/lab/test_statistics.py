"""Intervals that hold the truth as often as they say, and what too few seeds cannot tell."""

import itertools
import math

import numpy as np
import pytest

from deepseek_jax.lab.statistics import (
  fit_power_law,
  paired_difference,
  scaling_band,
  seeds_to_tell,
  summarise,
)


def by_seed(values):
  return dict(enumerate(values))


def test_mean_and_standard_error():
  values = [1.0, 2.0, 4.0]
  mean, error, count = summarise(values)
  assert (mean, count) == (pytest.approx(7 / 3), 3)
  assert error == pytest.approx(np.sqrt(np.var(values) * 3 / 2 / 3))


def test_one_seed_has_no_error_and_no_verdict():
  assert math.isnan(summarise([2.0]).error)
  alone = paired_difference({0: 1.0}, {0: 3.0})
  assert (alone.mean, alone.pairs, alone.known) == (-2.0, 1, False)
  none = paired_difference({0: 1.0}, {1: 3.0})
  assert math.isnan(none.mean)
  assert (none.pairs, none.known) == (0, False)


@pytest.mark.parametrize('values', [[], [1.0, math.nan], [math.inf]])
def test_what_diverged_is_not_averaged(values):
  with pytest.raises(ValueError, match='finite'):
    summarise(values)


def test_a_bootstrap_of_three_pairs_is_the_one_of_every_draw():
  """27 equally likely draws of three differences: quantiles by counting."""
  differences = [0.1, 0.4, 1.0]
  found = paired_difference(by_seed(differences), by_seed([0.0] * 3))
  means = [np.mean(draw) for draw in itertools.product(differences, repeat=3)]
  np.testing.assert_allclose(
    found.bootstrap, np.quantile(means, (0.025, 0.975), method='inverted_cdf')
  )
  # Student's t with two degrees of freedom, by hand: 4.303 standard errors.
  reach = 4.30265 * np.std(differences, ddof=1) / np.sqrt(3)
  assert found.low == pytest.approx(0.5 - reach, rel=1e-4)
  assert not found.known


def test_what_a_seed_does_to_both_goes_away():
  noise = np.random.default_rng(0)
  shared = noise.normal(0, 10, 6)
  baseline = by_seed(shared)
  found = paired_difference(by_seed(shared + 0.5 + noise.normal(0, 0.1, 6)), baseline)
  assert found.known
  assert found.low < 0.5 < found.high


@pytest.mark.parametrize('count', [3, 5, 10])
def test_intervals_hold_the_truth_as_often_as_they_say(count):
  noise = np.random.default_rng(count)
  held = wider = 0
  for _ in range(400):
    values = noise.normal(0.3, 1.0, count)
    found = paired_difference(by_seed(values), by_seed(np.zeros(count)), draws=200)
    held += found.low <= 0.3 <= found.high
    wider += found.bootstrap[0] <= 0.3 <= found.bootstrap[1]
  assert held / 400 > 0.93
  # The bootstrap alone falls short of it with few pairs, which is why it does not stand alone.
  if count == 3:
    assert wider / 400 < 0.85


def test_a_power_law_is_found_again():
  compute = np.geomspace(1e12, 1e17, 6)
  law = fit_power_law(compute, 1.5 + 300 * compute**-0.15)
  assert law.exponent == pytest.approx(0.15, abs=0.006)
  assert law.floor == pytest.approx(1.5, abs=0.03)
  np.testing.assert_allclose(law(compute), 1.5 + 300 * compute**-0.15, rtol=2e-3)
  few = fit_power_law(compute[:3], 300 * compute[:3] ** -0.15)
  assert few.floor == 0
  assert few.exponent == pytest.approx(0.15)


def test_a_band_widens_where_there_are_no_runs():
  noise = np.random.default_rng(3)
  compute = np.repeat(np.geomspace(1e12, 1e14, 4), 4)
  loss = 100 * compute**-0.1 * np.exp(noise.normal(0, 0.01, 16))
  at = np.array([1e13, 1e17])
  band = scaling_band(compute, loss, at, draws=200)
  truth = 100 * at**-0.1
  width = (band.high - band.low) / truth
  assert width[1] > 3 * width[0]
  assert band.low[0] < truth[0] < band.high[0]


def test_what_cannot_be_fitted_is_said():
  with pytest.raises(ValueError, match='found 1 size'):
    fit_power_law([1.0, 1.0], [2.0, 2.1])
  with pytest.raises(ValueError, match='positive'):
    fit_power_law([1.0, 2.0], [0.0, 1.0])
  with pytest.raises(ValueError, match='one run only at compute 2'):
    scaling_band([1.0, 1.0, 2.0], [3.0, 3.1, 2.0], [4.0])


def test_seeds_to_tell():
  """The first number of pairs whose Student interval leaves zero out."""
  # t(0.975, 8) = 2.306, t(0.975, 7) = 2.365: 2.306/√9 = 0.769 < 0.8 < 2.365/√8 = 0.836.
  assert seeds_to_tell(0.8, 1.0) == 9
  assert seeds_to_tell(-0.8, 1.0) == 9
  assert seeds_to_tell(-8.0, 10.0) == 9
  assert seeds_to_tell(1e-3, 1.0) is None
  assert seeds_to_tell(0.0, 1.0) is None
  assert seeds_to_tell(1.0, 0.0) is None
  found = paired_difference({0: 1.0, 1: 3.0, 2: 2.5}, {0: 1.0, 1: 1.0, 2: 3.0})
  needed = seeds_to_tell(found.mean, found.deviation)
  assert found.verdict == f'not distinguishable (it would take some {needed} seeds)'


def test_decimals():
  """A large figure has none, and so has its error."""
  assert summarise([2143.2, 2001.9]).text == '2,073 ± 71'
  assert summarise([2.1432, 2.0020]).text == '2.0726 ± 0.0706'
  assert paired_difference({0: 2100.0, 1: 2300.0}, {0: 2000.0, 1: 2100.0}).text.startswith('+150 [')
