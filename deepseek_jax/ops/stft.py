"""Sound as numbers: other sample rates, frames, spectra, mel bands; also while it comes in."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def hann(size: int) -> np.ndarray:
  """Returns the Hann window [size] float32, periodic: that of a frame among others."""
  return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)


def frames(x: jax.Array, size: int, hop: int) -> jax.Array:
  """Cuts a signal into overlapping frames.

  Args:
    x: [..., L] samples.
    size: samples of a frame, up to L.
    hop: samples from the start of a frame to that of the next.

  Returns:
    [..., F, size] with F = 1 + (L - size) // hop; what is left over at the end is in no frame.
  """
  count = 1 + (x.shape[-1] - size) // hop
  pieces = -(-size // hop)
  # A frame is a few neighbouring pieces of `hop` samples: slices instead of a gather, whose
  # gradient would be a scatter.
  length = (count - 1 + pieces) * hop
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, max(0, length - x.shape[-1]))])[..., :length]
  blocks = x.reshape(*x.shape[:-1], -1, hop)
  joined = jnp.concatenate([blocks[..., i : i + count, :] for i in range(pieces)], axis=-1)
  return joined[..., :size]


def stream_frames(
  tail: jax.Array, chunk: jax.Array, size: int, hop: int
) -> tuple[jax.Array, jax.Array]:
  """Cuts the next piece of a signal into frames, of which each ends with the newest `hop` samples.

  Whatever the pieces are, the frames of all are those of the whole signal with `size` - `hop` zeros
  before it.

  Args:
    tail: [..., size - hop] the samples before; zeros at the start of the signal.
    chunk: [..., n · hop] the next samples.
    size: samples of a frame, at least `hop`.
    hop: samples between frames.

  Returns:
    [..., n, size] frames, and the next tail.
  """
  x = jnp.concatenate([tail, chunk], axis=-1)
  return frames(x, size, hop), x[..., x.shape[-1] - (size - hop) :]


def power_spectrum(framed: jax.Array, window: np.ndarray) -> jax.Array:
  """Returns the squared magnitude of each frame's spectrum.

  Args:
    framed: [..., F, size] float32.
    window: [size] factor on each sample.

  Returns:
    [..., F, size // 2 + 1] float32, not divided by anything.
  """
  spectrum = jnp.fft.rfft(framed.astype(jnp.float32) * window, axis=-1)
  return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


def mel_matrix(rate: int, bins: int, bands: int, low: float = 0.0) -> np.ndarray:
  """Returns what sums a power spectrum into bands that are as wide as the ear hears them.

  Args:
    rate: samples a second.
    bins: of the spectrum: 0 to rate / 2 Hz.
    bands: how many; triangles with peaks of 1, evenly spaced in mel.
    low: Hz where the first begins; the last ends at rate / 2.

  Returns:
    [bins, bands] float32.

  Source: O'Shaughnessy, Speech Communication, 1987, page 150: mel(f) = 2595 · log10(1 + f / 700).
  """
  mel = lambda hertz: 2595.0 * np.log10(1.0 + hertz / 700.0)  # noqa: E731
  edges = np.linspace(mel(low), mel(rate / 2), bands + 2)
  edges = 700.0 * (10.0 ** (edges / 2595.0) - 1.0)
  hertz = np.linspace(0.0, rate / 2, bins)[:, None]
  rise = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
  fall = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
  return np.maximum(0.0, np.minimum(rise, fall)).astype(np.float32)


def log_mel(framed: jax.Array, rate: int, bands: int, floor: float = 1e-10) -> jax.Array:
  """Returns the loudness of each frame in each band.

  Args:
    framed: [..., F, size] float32 samples from -1 to 1.
    rate: samples a second.
    bands: how many.
    floor: power below which all is silence.

  Returns:
    [..., F, bands] float32: log10 of the power, as a share of that of a full-scale sine.
  """
  size = framed.shape[-1]
  window = hann(size)
  power = power_spectrum(framed, window) / (np.sum(window) / 2) ** 2
  bands_power = power @ mel_matrix(rate, size // 2 + 1, bands)
  return jnp.log10(jnp.maximum(bands_power, floor))


def resample(x: jax.Array, rate: int, new_rate: int) -> jax.Array:
  """Brings a signal to another sample rate, without what the new rate cannot hold.

  Args:
    x: [..., L] samples.
    rate: samples a second.
    new_rate: samples a second of the result.

  Returns:
    [..., ⌈L · new_rate / rate⌉]; what lies before and after the signal counts as silence.

  The filter is a windowed sinc with 10 zero crossings to each side. `new_rate` / gcd results depend
  on the same samples, but for a shift: they are one product of a frame with a matrix.

  Source: Crochiere & Rabiner, Multirate Digital Signal Processing, 1983, section 2.3 (polyphase
    structures); the Kaiser window with β = 5: the default of scipy.signal.resample_poly.
  """
  divisor = math.gcd(rate, new_rate)
  up, down = new_rate // divisor, rate // divisor
  if up == down:
    return x
  matrix, before = _phases(up, down)
  length = -(-x.shape[-1] * up // down)
  count = -(-length // up)
  after = (count - 1) * down + matrix.shape[0] - before - x.shape[-1]
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, max(0, after))])
  y = frames(x, matrix.shape[0], down)[..., :count, :] @ matrix.astype(x.dtype)
  return y.reshape(*x.shape[:-1], -1)[..., :length]


def _phases(up: int, down: int) -> tuple[np.ndarray, int]:
  """The filter as a matrix [samples, up], and how many of the samples lie before the frame."""
  half = 10 * max(up, down)
  taps = np.arange(-half, half + 1) / max(up, down)
  kernel = np.sinc(taps) * np.kaiser(2 * half + 1, 5.0)
  kernel *= up / kernel.sum()
  before = half // up
  rows = np.arange(-before, ((up - 1) * down + half) // up + 1)[:, None]
  place = half + np.arange(up)[None] * down - rows * up
  inside = (place >= 0) & (place <= 2 * half)
  return np.where(inside, kernel[np.clip(place, 0, 2 * half)], 0.0).astype(np.float32), before
