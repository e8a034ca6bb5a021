"""Sounds at another rate, against the analytic tone and against the definition."""

import numpy as np
import pytest

from deepseek_jax.data.media.waveform import mono, resample


@pytest.mark.parametrize(
  ('rate', 'wanted'), [(44_100, 16_000), (8000, 16_000), (48_000, 8000), (7993, 16_000)]
)
def test_a_tone_stays_a_tone(rate, wanted):
  """Away from the ends it is the same sine, sampled at other times."""
  tone = lambda r: np.sin(2 * np.pi * 700 * np.arange(r // 2) / r + 0.3)  # noqa: E731
  found = resample(tone(rate), rate, wanted)
  assert len(found) == -(-(rate // 2) * wanted // rate)
  inside = slice(wanted // 100, wanted // 2 - wanted // 100)
  np.testing.assert_allclose(found[inside], tone(wanted)[: len(found)][inside], atol=2e-4)


def test_what_is_too_high_is_gone():
  """6 kHz cannot be told at 8 kHz, where it would be 2 kHz."""
  high = np.sin(2 * np.pi * 6000 * np.arange(20_000) / 40_000)
  assert np.abs(resample(high, 40_000, 8000)[100:-100]).max() < 1e-3


def test_like_the_sum_that_it_is():
  """Each new sample from the definition: all samples, weighted by a sinc under a Kaiser window."""
  wave = np.random.default_rng(0).standard_normal(200)
  found = resample(wave, 8, 5)
  reach, cutoff = np.ceil(16 * 8 / 5), 5 / 8
  for n in range(0, len(found), 7):
    weights = np.zeros(400)
    for k in range(-100, 300):
      x = n * 8 / 5 - k
      if abs(x) <= reach:
        window = np.i0(8 * np.sqrt(1 - (x / reach) ** 2))
        weights[k + 100] = np.sinc(cutoff * x) * window
    wanted = weights[100:300] @ wave / weights.sum()
    assert found[n] == pytest.approx(wanted, abs=1e-4)


def test_small_ones():
  assert resample(np.ones(5), 8, 8).tolist() == [1.0] * 5
  assert resample(np.zeros(0), 8, 4).shape == (0,)
  assert mono(np.array([[1.0, 3.0], [2.0, 0.0]])).tolist() == [2.0, 1.0]
  assert mono(np.ones(3)).shape == (3,)
