"""Rotary embedding against complex numbers, and YaRN against published values."""

import itertools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.ops.rope import (
  axial_angles,
  rope_frequencies,
  rotate,
  turn,
  yarn_frequencies,
  yarn_magnitude,
)

V3 = {'theta': 10_000.0, 'factor': 40.0, 'original_length': 4096}
V4_COMPRESSED = {'theta': 160_000.0, 'factor': 16.0, 'original_length': 65_536}


def yarn(dim, theta, **other):
  return yarn_frequencies(
    rope_frequencies(dim, theta), theta=theta, beta_fast=32.0, beta_slow=1.0, **other
  )


def test_frequencies():
  want = [1000.0 ** (-2 * k / 6) for k in range(3)]
  np.testing.assert_allclose(rope_frequencies(6, 1000.0), want, rtol=1e-7)


@pytest.mark.parametrize(
  ('settings', 'golden'),
  [
    (
      V3,
      {
        9: 7.498942e-2,
        11: 3.900693e-2,
        16: 5.5e-3,
        20: 7.905694e-4,
        24: 2.5e-5,
        31: 3.333804e-6,
      },
    ),
    (
      V4_COMPRESSED,
      {10: 2.364354e-2, 16: 2.265625e-3, 20: 2.969778e-4, 24: 1.953125e-5, 31: 5.680529e-7},
    ),
  ],
)
def test_yarn_frequencies_of_the_released_models(settings, golden):
  got = yarn(64, **settings)
  assert got.dtype == np.float32
  assert got.shape == (32,)
  np.testing.assert_allclose(got[list(golden)], list(golden.values()), rtol=5e-7)


def test_yarn_keeps_fast_channels_and_slows_slow_ones():
  plain, slowed = rope_frequencies(64, 10_000.0), yarn(64, **V3)
  np.testing.assert_array_equal(slowed[:11], plain[:11])
  np.testing.assert_allclose(slowed[23:], plain[23:] / 40, rtol=1e-6)
  ratio = slowed / plain
  assert np.all(np.diff(ratio[10:24]) < 0)


def test_yarn_ramp_of_no_width_is_a_step():
  # Six original positions: no channel turns once, so both ends of the ramp are 0.
  got = yarn(8, theta=100.0, factor=4.0, original_length=6)
  plain = rope_frequencies(8, 100.0)
  assert np.all(np.isfinite(got))
  np.testing.assert_allclose(got[1:], plain[1:] / 4, rtol=1e-6)


def test_yarn_magnitude():
  # V3's key has 192 channels; its softmax scale is their root times the magnitude squared.
  assert 192**-0.5 * yarn_magnitude(40.0, 1.0) ** 2 == pytest.approx(0.135234, abs=5e-7)
  assert yarn_magnitude(40.0, 1.0) ** 2 == pytest.approx(1.873854, abs=5e-7)
  assert yarn_magnitude(40.0, 0.707) ** 2 == pytest.approx(1.58963, abs=5e-6)
  assert yarn_magnitude(1.0, 1.0) == 1.0


def rotate_oracle(x, positions, frequencies, magnitude):
  out = np.zeros(x.shape, np.float64)
  for index in itertools.product(*(range(size) for size in x.shape[:-1])):
    position = positions[index[:2]]
    for k, frequency in enumerate(frequencies.astype(np.float64)):
      number = complex(x[(*index, 2 * k)], x[(*index, 2 * k + 1)])
      number *= np.exp(1j * position * frequency) * magnitude
      out[(*index, 2 * k)], out[(*index, 2 * k + 1)] = number.real, number.imag
  return out


@pytest.mark.parametrize('heads', [(), (3,)])
@pytest.mark.parametrize('magnitude', [1.0, 1.37])
def test_rotate(heads, magnitude):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 5, *heads, 6)).astype(np.float32)
  positions = np.array([[0, 1, 2, 0, 1], [7, 40, 333, 2, 900]], np.int32)
  frequencies = rope_frequencies(6, 50.0)
  got = rotate(jnp.asarray(x), jnp.asarray(positions), frequencies, magnitude)
  want = rotate_oracle(x, positions, frequencies, magnitude)
  # float32 angles near 900 radians are good to about 6e-5.
  np.testing.assert_allclose(got, want, atol=2e-4)
  np.testing.assert_allclose(got[0], want[0], atol=2e-6)


def test_rotate_depends_on_distance_alone():
  rng = np.random.default_rng(1)
  query, key = (jnp.asarray(rng.standard_normal((1, 1, 8)), jnp.float32) for _ in range(2))
  frequencies = rope_frequencies(8, 100.0)

  def score(t, s):
    a = rotate(query, jnp.array([[t]]), frequencies)
    b = rotate(key, jnp.array([[s]]), frequencies)
    return float(jnp.sum(a * b))

  assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
  assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_rotate_keeps_bfloat16_and_its_angles_do_not():
  x = jnp.ones((1, 1, 4), jnp.bfloat16)
  # Between 1024 and 1032 bfloat16 has no number: a bfloat16 angle would be off by radians.
  got = rotate(x, jnp.array([[1027]]), rope_frequencies(4, 100.0))
  assert got.dtype == jnp.bfloat16
  want = rotate_oracle(np.ones((1, 1, 4)), np.array([[1027]]), rope_frequencies(4, 100.0), 1.0)
  np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=2**-7)
  wrong = rotate_oracle(
    np.ones((1, 1, 4)),
    np.array([[1027.0]]).astype(ml_dtypes.bfloat16).astype(np.float64),
    rope_frequencies(4, 100.0),
    1.0,
  )
  assert np.max(np.abs(wrong - want)) > 0.1


@pytest.mark.parametrize('axes', [1, 2, 3])
def test_axes_turn_pairs_of_their_own(axes):
  """Each axis is a plain rotation of its share of the channels; odd shares go to the first axes."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((2, 5, 3, 16)), jnp.float32)
  places = jnp.asarray(rng.integers(0, 9, (2, 5, axes)), jnp.int32)
  got = turn(x, axial_angles(places, 16, 100.0))
  start = 0
  for axis, pairs in enumerate({1: (8,), 2: (4, 4), 3: (3, 3, 2)}[axes]):
    part = slice(start, start + 2 * pairs)
    want = rotate(x[..., part], places[..., axis], rope_frequencies(2 * pairs, 100.0))
    np.testing.assert_allclose(got[..., part], want, atol=1e-6)
    start += 2 * pairs
  assert start == 16


def test_a_score_depends_on_the_step_in_the_grid_alone():
  rng = np.random.default_rng(1)
  query, key = (jnp.asarray(rng.standard_normal((1, 1, 12)), jnp.float32) for _ in range(2))

  def score(a, b):
    a, b = (jnp.array([[place]], jnp.int32) for place in (a, b))
    q, k = (turn(x, axial_angles(p, 12, 100.0)) for x, p in ((query, a), (key, b)))
    return float(jnp.sum(q * k))

  assert score((5, 2, 1), (3, 3, 0)) == pytest.approx(score((9, 4, 8), (7, 5, 7)), abs=1e-5)
  for other in ((4, 3, 0), (3, 2, 0), (3, 3, 1)):
    assert abs(score((5, 2, 1), (3, 3, 0)) - score((5, 2, 1), other)) > 1e-3
