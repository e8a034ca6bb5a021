"""Spectra against scipy, mel bands against loops, and sound in pieces against the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from deepseek_jax.ops.stft import (
  frames,
  hann,
  log_mel,
  mel_matrix,
  power_spectrum,
  resample,
  stream_frames,
)


def noise(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
  ('length', 'size', 'hop'), [(100, 10, 10), (101, 25, 10), (57, 7, 3), (9, 9, 4), (64, 5, 8)]
)
def test_frames(length, size, hop):
  """Against slices; the gradient of a sum counts in how many frames a sample is."""
  x = noise(2, length)
  want = np.stack([x[:, i : i + size] for i in range(0, length - size + 1, hop)], axis=1)
  np.testing.assert_array_equal(frames(jnp.asarray(x), size, hop), want)
  times = np.zeros(length)
  for start in range(0, length - size + 1, hop):
    times[start : start + size] += 1
  found = jax.grad(lambda x: jnp.sum(frames(x, size, hop)))(jnp.asarray(x))
  np.testing.assert_array_equal(found, np.stack([times] * 2))


@pytest.mark.parametrize(('size', 'hop'), [(64, 16), (100, 40), (25, 10)])
def test_spectra_are_those_of_scipy(size, hop):
  x = noise(2, 700)
  np.testing.assert_allclose(hann(size), scipy.signal.get_window('hann', size), atol=1e-7)
  _, _, spectrum = scipy.signal.stft(
    x.astype(np.float64),
    window='hann',
    nperseg=size,
    noverlap=size - hop,
    boundary=None,
    padded=False,
  )
  # scipy divides by the window's sum.
  want = np.abs(spectrum * hann(size).sum()) ** 2
  found = power_spectrum(frames(jnp.asarray(x), size, hop), hann(size))
  np.testing.assert_allclose(found, want.swapaxes(1, 2), rtol=1e-4, atol=1e-4 * want.max())


def test_gradient_of_the_spectrum():
  """By Parseval: the power of a window's real transform, counted twice but for the ends."""
  x, window = jnp.asarray(noise(1, 8)), hann(8)
  weights = jnp.array([1.0, 2, 2, 2, 1]) / 8

  def total(x):
    return jnp.sum(power_spectrum(frames(x, 8, 8), window) * weights)

  np.testing.assert_allclose(jax.grad(total)(x), 2 * x * window**2, rtol=1e-4, atol=1e-6)


def test_mel_bands():
  """Triangles: band b rises from edge b to 1 at edge b + 1 and falls to edge b + 2."""
  matrix = mel_matrix(8000, 65, 12, low=50.0)
  assert matrix.shape == (65, 12)
  top = 2595 * np.log10(1 + 4000 / 700)
  bottom = 2595 * np.log10(1 + 50 / 700)
  edges = [700 * (10 ** ((bottom + (top - bottom) * i / 13) / 2595) - 1) for i in range(14)]
  for k, band in np.ndindex(65, 12):
    hertz, (a, b, c) = 4000 * k / 64, edges[band : band + 3]
    want = 0.0
    if a < hertz <= b:
      want = (hertz - a) / (b - a)
    elif b < hertz < c:
      want = (c - hertz) / (c - b)
    assert matrix[k, band] == pytest.approx(want, abs=1e-5)


def test_loudness_of_a_tone():
  """A full-scale sine at the peak of a band has power 1, that is 0, there; silence the floor."""
  rate, size = 8000, 400
  hertz = 1000.0
  tone = np.sin(2 * np.pi * hertz * np.arange(2000) / rate).astype(np.float32)
  found = np.asarray(log_mel(frames(jnp.asarray(tone), size, size), rate, 20))
  peak = mel_matrix(rate, size // 2 + 1, 20)[int(hertz * size / rate)]
  loudest = found[0].argmax()
  assert loudest == peak.argmax()
  # The window spreads it over three bins.
  assert abs(found[0, loudest]) < 0.3
  quiet = np.asarray(log_mel(jnp.zeros((1, size)), rate, 20))
  np.testing.assert_allclose(quiet, -10.0, atol=1e-4)


@pytest.mark.parametrize(
  ('rate', 'new_rate', 'length'),
  [
    (16_000, 8_000, 333),
    (8_000, 16_000, 200),
    (44_100, 16_000, 2000),
    (22_050, 16_000, 1111),
    (48_000, 16_000, 999),
    (11_025, 8_000, 50),
  ],
)
def test_resampling_is_that_of_scipy(rate, new_rate, length):
  x = noise(2, length)
  want = scipy.signal.resample_poly(x.astype(np.float64), new_rate, rate, axis=-1)
  found = resample(jnp.asarray(x), rate, new_rate)
  assert found.shape == want.shape
  np.testing.assert_allclose(found, want, atol=1e-5)


def test_resampling_is_linear_and_keeps_a_rate():
  x = jnp.asarray(noise(300))
  assert resample(x, 16_000, 16_000) is x
  matrix = jax.jacobian(lambda x: resample(x, 3, 2))(x)
  np.testing.assert_allclose(matrix @ x, resample(x, 3, 2), atol=1e-4)
  # A tone above half of the new rate is gone; one below it stays.
  seconds = np.arange(4000) / 16_000
  for hertz, kept in ((1000, True), (3500, False)):
    tone = jnp.asarray(np.sin(2 * np.pi * hertz * seconds), jnp.float32)
    loud = float(jnp.std(resample(tone, 16_000, 4_000)[100:-100]))
    assert (loud > 0.7) if kept else (loud < 1e-2)


@pytest.mark.parametrize('pieces', [(1, 1, 1, 1, 1, 1, 1), (3, 4), (2, 1, 4), (7,)])
def test_sound_in_pieces_is_the_whole(pieces):
  size, hop = 25, 10
  x = jnp.asarray(noise(2, 7 * hop))
  want = frames(jnp.pad(x, ((0, 0), (size - hop, 0))), size, hop)
  tail, found, start = jnp.zeros((2, size - hop)), [], 0
  for count in pieces:
    chunk = x[:, start : start + count * hop]
    framed, tail = stream_frames(tail, chunk, size, hop)
    found.append(framed)
    start += count * hop
  np.testing.assert_array_equal(jnp.concatenate(found, axis=1), want)
  assert want.shape == (2, 7, size)
  # Each ends with the newest samples.
  np.testing.assert_array_equal(want[:, 2, -hop:], x[:, 2 * hop : 3 * hop])
