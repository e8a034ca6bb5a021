"""Sounds as arrays: channels, rates and lengths brought to what a batch has."""

import functools
import math

import numpy as np

# Zero crossings of the filter's kernel on either side, and how steep its window is.
_CROSSINGS = 16
_KAISER = 8.0
_CHUNK = 1 << 16


def resample(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
  """A waveform [N] at another rate, filtered so that what is too high does not come back lower.

  Every new sample is a weighted sum of those around its time, with the weights of a windowed sinc.

  Args:
    wave: the waveform.
    rate: samples a second that it has.
    wanted: samples a second that it shall have.

  Returns:
    [ceil(N · wanted / rate)] float64.

  Source: J. O. Smith, 'Digital Audio Resampling Home Page', the theory of operation.
  """
  wave = np.asarray(wave, np.float64)
  if rate == wanted or not len(wave):
    return wave
  divisor = math.gcd(rate, wanted)
  up, down = wanted // divisor, rate // divisor
  count = -(-len(wave) * up // down)
  table = _kernel(up, down)
  reach = table.shape[1] // 2
  padded = np.pad(wave, reach)
  result = np.empty(count)
  for start in range(0, count, _CHUNK):
    ticks = np.arange(start, min(count, start + _CHUNK)) * down
    around = ticks[:, None] // up + np.arange(1, 2 * reach + 1)
    result[start : start + len(ticks)] = np.einsum('nk,nk->n', padded[around], table[ticks % up])
  return result


@functools.lru_cache(maxsize=16)
def _kernel(up: int, down: int) -> np.ndarray:
  """Weights [up, 2 · reach] of the samples around a time that lies p / up after one, for each p."""
  cutoff = min(1.0, up / down)
  reach = math.ceil(_CROSSINGS / cutoff)
  offset = np.arange(up)[:, None] / up - np.arange(1 - reach, reach + 1)
  window = np.i0(_KAISER * np.sqrt(np.maximum(0, 1 - (offset / reach) ** 2)))
  weights = np.sinc(cutoff * offset) * window
  # Each sums to one, or a constant would come back with a ripple.
  return weights / weights.sum(axis=1, keepdims=True)


def mono(wave: np.ndarray) -> np.ndarray:
  """Channels [N, C] or one [N] as one [N]: the mean, in which none is louder than it was."""
  return wave if wave.ndim == 1 else wave.mean(axis=1)
