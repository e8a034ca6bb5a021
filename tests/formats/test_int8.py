"""Eight-bit blocks against a NumPy loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.formats.int8 import Int8Blocks, decode, encode


def oracle(x, block):
  """Encodes and decodes one block at a time."""
  flat = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
  values, scales, decoded = np.zeros(flat.shape, np.int8), [], np.zeros(flat.shape)
  for row, line in enumerate(flat):
    for start in range(0, len(line), block):
      piece = line[start : start + block]
      scale = np.max(np.abs(piece)) / 127
      whole = np.rint(piece / scale) if scale else np.zeros(len(piece))
      values[row, start : start + block] = whole
      decoded[row, start : start + block] = whole * scale
      scales.append(scale)
  return values.reshape(x.shape), np.array(scales), decoded.reshape(x.shape)


@pytest.mark.parametrize(
  ('shape', 'block'), [((3, 5, 12), 4), ((2, 7), 3), ((2, 3, 2, 10), 64), ((1,), 1), ((4, 9), 9)]
)
def test_matches_the_oracle(shape, block):
  rng = np.random.default_rng(0)
  x = (rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4, shape)).astype(np.float32)
  x.reshape(-1)[-1] = 0
  encoded = encode(x, block)
  values, scales, decoded = oracle(x, block)
  # float32 and float64 may differ by one at a tie.
  assert np.max(np.abs(encoded.values.astype(np.int32) - values)) <= 1
  assert np.mean(np.asarray(encoded.values) == values) > 0.98
  np.testing.assert_allclose(encoded.scales.reshape(-1), scales, rtol=1e-6)
  assert encoded.values.dtype == jnp.int8
  assert encoded.scales.shape == (*shape[:-1], -(-shape[-1] // block))
  got = decode(encoded, block)
  # No element is further off than half a step, and no closer than a rounding allows.
  steps = np.repeat(np.asarray(encoded.scales), block, axis=-1)[..., : shape[-1]]
  assert np.all(np.abs(got - x) <= 0.5001 * steps)
  assert np.mean(np.abs(got - decoded) <= 1e-5 * np.abs(x).max()) > 0.98


def test_the_largest_of_a_block_is_kept():
  x = np.array([[0.1, -3.0, 2.9, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
  got = decode(encode(x, 2), 2)
  np.testing.assert_allclose(got[0, 1:3], x[0, 1:3], rtol=1e-6)
  np.testing.assert_array_equal(got[1], 0)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes(dtype):
  x = jnp.linspace(-2, 3, 24).reshape(2, 12).astype(dtype)
  got = decode(encode(x, 4), 4, dtype)
  assert got.dtype == dtype
  assert 0 < np.max(np.abs(got.astype(np.float32) - x.astype(np.float32))) <= 3 / 254 + 0.01


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_faults_stay_visible(bad):
  x = np.ones((2, 8), np.float32)
  x[0, 5] = bad
  got = np.asarray(decode(encode(x, 4), 4))
  assert np.isnan(got[0, 5])
  np.testing.assert_allclose(got[0, :4], 1, rtol=1e-6)
  np.testing.assert_allclose(got[1], 1, rtol=1e-6)


def test_memory():
  """One byte an element and four a block."""
  encoded = jax.eval_shape(lambda x: encode(x, 64), jnp.zeros((2, 10, 192)))
  assert isinstance(encoded, Int8Blocks)
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in encoded)
  assert size == 2 * 10 * (192 + 4 * 3)
