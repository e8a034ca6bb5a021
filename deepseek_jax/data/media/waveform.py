"""Sounds as arrays: channels, rates and lengths brought to what a batch has."""

import fractions

import numpy as np


def resample(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
  """A waveform [N] at another rate, filtered so that what is too high does not come back lower.

  Args:
    wave: the waveform.
    rate: samples a second that it has.
    wanted: samples a second that it shall have.

  Returns:
    [ceil(N · wanted / rate)] float64.
  """
  if rate == wanted or not len(wave):
    return np.asarray(wave, np.float64)
  from scipy.signal import resample_poly  # here, because it is slow to import

  ratio = fractions.Fraction(wanted, rate)
  return resample_poly(np.asarray(wave, np.float64), ratio.numerator, ratio.denominator)


def mono(wave: np.ndarray) -> np.ndarray:
  """Channels [N, C] or one [N] as one [N]: the mean, in which none is louder than it was."""
  return wave if wave.ndim == 1 else wave.mean(axis=1)
