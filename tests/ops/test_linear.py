"""Products with weights: the values and gradients of the obvious form, made by libraries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.linear import linear, linear_reference


def gradients(function, x, w, grad):
  """Returns the product, and the gradients of `x` and `w`."""
  y, pull = jax.vjp(function, x, w)
  return y, *pull(grad)


def drawn(shape, dtype):
  """Returns x [*shape, 37], w [37, 45] and a gradient [*shape, 45]."""
  keys = jax.random.split(jax.random.key(0), 3)
  sizes = ((*shape, 37), (37, 45), (*shape, 45))
  return [jax.random.normal(key, size, dtype) for key, size in zip(keys, sizes, strict=True)]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('shape', [(7,), (1, 1), (2, 45), (2, 3, 7)])
def test_against_the_reference(shape, dtype):
  given = drawn(shape, dtype)
  found = jax.jit(lambda *a: gradients(linear, *a))(*given)
  wide = [x.astype(jnp.float32) for x in given]
  # One rounding to eight bits, of sums that are float32.
  limit = 1e-5 if dtype == 'float32' else 2**-7
  for got, want in zip(found, gradients(linear_reference, *wide), strict=True):
    assert got.dtype == dtype
    error = np.abs(np.asarray(got, np.float32) - np.asarray(want))
    assert error.max() <= limit * np.abs(want).max()


def test_a_library_multiplies_all_three_products():
  """In bfloat16 on a CPU none is left to the compiler's plain loop, as that of JAX's rule is."""
  keys = jax.random.split(jax.random.key(0), 3)
  sizes = ((2, 64, 128), (128, 256), (2, 64, 256))
  given = [jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(keys, sizes)]

  def plain_products(function):
    compiled = jax.jit(lambda *a: gradients(function, *a)).lower(*given).compile()
    lines = compiled.as_text().splitlines()
    return [x for x in lines if ' dot(' in x and 'lhs_contracting_dims={0}, rhs_con' in x]

  if jax.default_backend() != 'cpu':
    pytest.skip('what a CPU does')
  assert len(plain_products(linear_reference)) == 1
  assert not plain_products(linear)
