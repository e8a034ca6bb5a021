"""E4M3 tiles and E2M1 blocks: published values, loops in NumPy, ends that are not whole."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.formats import float4, float8
from deepseek_jax.formats.powers import ceil_power_of_two

SINES = (3 * np.sin(np.arange(1, 129))).astype(np.float32)[None]


def test_powers_of_two():
  x = np.float32([1.0, 1.0000001, 0.5, 0.50001, 3.0, 2.0**-126, 448 / 448, 1e-4 / 448, 2.0**20])
  want = 2.0 ** np.ceil(np.log2(x.astype(np.float64)))
  np.testing.assert_array_equal(ceil_power_of_two(jnp.asarray(x)), want)
  assert np.isnan(ceil_power_of_two(jnp.float32([np.inf, np.nan]))).all()


def test_values_of_the_released_kernels():
  encoded = float8.encode(SINES, (1, 128))
  assert encoded.scales.astype(jnp.float32) == 2.0**-7
  want = [2.5, 2.75, 0.4375, -2.25, -3, -0.8125, 2, 3]
  np.testing.assert_array_equal(float8.decode(encoded, (1, 128))[0, :8], want)
  encoded = float4.encode(SINES[:, :32])
  assert encoded.scales.astype(jnp.float32) == 0.5
  want = [3, 3, 0.5, -2, -3, -0.75, 2, 3]
  np.testing.assert_array_equal(float4.decode(encoded)[0, :8], want)


@pytest.mark.parametrize('scale', ['float32', 'power'])
@pytest.mark.parametrize(
  ('shape', 'tile'),
  [((2, 256, 256), (128, 128)), ((576, 200), (128, 128)), ((3, 1, 37), (1, 128)), ((7, 5), (2, 3))],
)
def test_tiles_match_a_loop(shape, tile, scale):
  """With ends that fill no tile."""
  rng = np.random.default_rng(0)
  x = (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 6, shape)).astype(np.float32)
  encoded = float8.encode(x, tile, scale)
  rows, columns = -(-shape[-2] // tile[0]), -(-shape[-1] // tile[1])
  assert encoded.scales.shape == (*shape[:-2], rows, columns)
  assert encoded.values.shape == shape
  decoded = np.asarray(float8.decode(encoded, tile))
  for flat, values, scales, back in zip(
    *(np.asarray(a).reshape(-1, *a.shape[-2:]) for a in (x, *encoded, decoded)), strict=True
  ):
    for i in range(rows):
      for j in range(columns):
        at = np.s_[i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
        want = np.float32(max(np.abs(flat[at]).max(), 1e-4)) / np.float32(448)
        if scale == 'power':
          want = 2.0 ** np.ceil(np.log2(np.float64(want)))
        # The compiler multiplies by 1 / 448; a power of two hides the last bit.
        found = np.float32(scales[i, j])
        np.testing.assert_allclose(found, want, rtol=0 if scale == 'power' else 2e-7)
        rounded = np.clip(flat[at] / found, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(values[at].astype(np.float32), rounded.astype(np.float32))
        np.testing.assert_array_equal(back[at], rounded.astype(np.float32) * found)


def test_blocks_match_the_format():
  """Every number of the grid and every tie, under a scale of each size."""
  grid = np.float32([*float4.GRID, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.01, 0.2501])
  near = np.float32([*float4.GRID, 0, 1, 1, 2, 2, 4, 4, 6, 0.5])
  x, want = (np.concatenate([a, -a[1:], np.zeros(0, np.float32)])[:32] for a in (grid, near))
  assert np.abs(x).max() == 6
  for power in (-120, -20, 0, 7):
    got = float4.decode(float4.encode(jnp.asarray(x * np.float32(2.0) ** power)))
    np.testing.assert_array_equal(got, want * np.float32(2.0) ** power)
  nearest = want.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
  np.testing.assert_array_equal(x.astype(ml_dtypes.float4_e2m1fn).astype(np.float32), nearest)
  low, high = float4.encode(jnp.float32([1.5, -6.0] + [0] * 30)).values[0] & 15, 1.5
  assert float4.GRID[int(low)] == high


def test_blocks_of_any_shape():
  x = np.random.default_rng(1).standard_normal((3, 5, 96)).astype(np.float32)
  encoded = float4.encode(x)
  assert encoded.values.shape == (3, 5, 48)
  assert encoded.scales.shape == (3, 5, 3)
  back = float4.decode(encoded)
  steps = np.repeat(np.asarray(encoded.scales, np.float32), 32, axis=-1)
  # Steps are 2 between 4 and 6, the largest.
  assert np.all(np.abs(back - x) <= steps)
  np.testing.assert_array_equal(float4.decode(float4.encode(back)), back)
  with pytest.raises(ValueError, match=r'x \[4, 33\]: expected a last axis that 32 divides'):
    float4.encode(jnp.zeros((4, 33)))


@pytest.mark.parametrize('fault', [np.nan, np.inf, -np.inf])
def test_faults_stay_visible(fault):
  x = np.ones((2, 256), np.float32)
  x[0, 3] = fault
  for module, options in ((float8, ((1, 128),)), (float4, ())):
    back = np.asarray(module.decode(module.encode(x, *options), *options))
    assert np.isnan(back[0, :32]).all()
    assert np.isfinite(back[1]).all()
    assert np.isfinite(back[0, 128:]).all()


def test_under_jit():
  x = jnp.asarray(SINES)
  found = jax.jit(lambda x: float8.decode(float8.encode(x, (1, 128)), (1, 128)))(x)
  np.testing.assert_array_equal(found, float8.decode(float8.encode(x, (1, 128)), (1, 128)))
