"""Four-bit blocks against numbers worked out by hand and a NumPy loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.formats.int4 import Int4Blocks, decode, encode


def test_golden_values():
  """Codes and bytes by hand: the first of two is in the low four bits, −1 is 15."""
  x = np.array([[7.0, -7.0, 1.0, -1.0, 3.4, -3.6, 0.0, 2.0]], np.float32)
  encoded = encode(x, 8)
  np.testing.assert_array_equal(encoded.scales, [[1.0]])
  np.testing.assert_array_equal(encoded.values, [[0x97, 0xF1, 0xC3, 0x20]])
  np.testing.assert_array_equal(decode(encoded, 8), [[7, -7, 1, -1, 3, -4, 0, 2]])


def test_what_it_has_comes_back_exactly():
  """Every integer in every place of a byte, at scales that are powers of two."""
  first, second = np.meshgrid(np.arange(-7, 8), np.arange(-7, 8))
  pairs = np.stack([first.ravel(), second.ravel()], axis=-1).astype(np.float32)
  for scale in (1.0, 2.0**-30, 2.0**40):
    # Two more in each block, so that its largest is 7.
    x = np.concatenate([pairs, np.broadcast_to([7.0, -7.0], pairs.shape)], axis=-1) * scale
    x = x.astype(np.float32)
    np.testing.assert_array_equal(decode(encode(x, 4), 4), x)


@pytest.mark.parametrize(('shape', 'block'), [((3, 5, 12), 4), ((2, 6), 2), ((1, 3, 66), 22)])
def test_matches_the_oracle(shape, block):
  """Rounding to the nearest of 15 steps, at most half a step off, one block at a time."""
  rng = np.random.default_rng(0)
  x = (rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4, shape)).astype(np.float32)
  encoded = encode(x, block)
  assert encoded.values.shape == (*shape[:-1], shape[-1] // 2)
  assert encoded.values.dtype == jnp.uint8
  got = np.asarray(decode(encoded, block)).reshape(-1, block)
  for found, wanted, scale in zip(got, x.reshape(-1, block), np.ravel(encoded.scales), strict=True):
    step = np.abs(wanted).max() / 7
    np.testing.assert_allclose(scale, step, rtol=1e-6)
    assert np.abs(found - wanted).max() <= 0.5001 * step
    assert np.abs(found - np.rint(wanted / step) * step).max() <= 1e-5 * step


def test_zeros_and_faults():
  """A block of zeros stays; one with an infinity or a NaN is NaN, and its neighbours are not."""
  assert not np.any(decode(encode(np.zeros((2, 8), np.float32), 4), 4))
  for bad in (np.nan, np.inf, -np.inf):
    x = np.ones((2, 8), np.float32)
    x[0, 5] = bad
    got = np.asarray(decode(encode(x, 4), 4))
    assert np.isnan(got[0, 4:]).all()
    np.testing.assert_array_equal(got[0, :4], 1)
    np.testing.assert_array_equal(got[1], 1)


@pytest.mark.parametrize(('width', 'block'), [(6, 3), (6, 4)])
def test_blocks_that_do_not_fit(width, block):
  """Refused by name."""
  with pytest.raises(ValueError, match='expected an even block that divides'):
    encode(jnp.zeros((2, width)), block)


def test_memory():
  """Half a byte an element and four a block."""
  encoded = jax.eval_shape(lambda x: encode(x, 64), jnp.zeros((2, 10, 192)))
  assert isinstance(encoded, Int4Blocks)
  assert sum(leaf.size * leaf.dtype.itemsize for leaf in encoded) == 2 * 10 * (96 + 4 * 3)
