"""Every form of the grouped product against a loop over rows, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.grouped_matmul import (
  block_groups,
  grouped_matmul_blocks,
  grouped_matmul_ragged,
  grouped_matmul_reference,
)

ROWS, D, F = 24, 5, 7
CASES = {
  'even': (8, 8, 8),
  'zeros': (0, 16, 0, 8),
  'one_group': (0, 0, 24),
  'rest': (8, 0, 8),
  'nothing': (0, 0),
}


def groups_of_rows(sizes, rows):
  groups = np.repeat(np.arange(len(sizes)), sizes)
  return np.concatenate([groups, np.full(rows - len(groups), -1)])


def multiply_oracle(x, w, sizes):
  out = np.zeros((len(x), w.shape[2]))
  for row, group in enumerate(groups_of_rows(sizes, len(x))):
    if group >= 0:
      out[row] = x[row].astype(np.float64) @ w[group].astype(np.float64)
  return out


def gradients_oracle(x, w, sizes, grad):
  grad_x, grad_w = np.zeros(x.shape), np.zeros(w.shape)
  for row, group in enumerate(groups_of_rows(sizes, len(x))):
    if group >= 0:
      grad_x[row] = w[group].astype(np.float64) @ grad[row]
      grad_w[group] += np.outer(x[row].astype(np.float64), grad[row])
  return grad_x, grad_w


def inputs(sizes, dtype=np.float32):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((ROWS, D)).astype(dtype)
  w = rng.standard_normal((len(sizes), D, F)).astype(dtype)
  return x, w, rng.standard_normal((ROWS, F)).astype(dtype)


FORMS = {
  'reference': grouped_matmul_reference,
  'ragged': grouped_matmul_ragged,
  'blocks_1': functools.partial(grouped_matmul_blocks, block=1),
  'blocks_4': functools.partial(grouped_matmul_blocks, block=4),
  'blocks_8': functools.partial(grouped_matmul_blocks, block=8),
}


@functools.cache
def jitted(form):
  @jax.jit
  def run(x, w, sizes, grad):
    out, back = jax.vjp(lambda x, w: FORMS[form](x, w, sizes), x, w)
    return out, *back(grad)

  return run


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('case', CASES)
def test_form(form, case):
  sizes = CASES[case]
  x, w, grad = inputs(sizes)
  got = jitted(form)(x, w, jnp.asarray(sizes, jnp.int32), grad)
  want = multiply_oracle(x, w, sizes), *gradients_oracle(x, w, sizes, grad)
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('block', [1, 4])
def test_blocks_smaller_than_groups_of_odd_size(block):
  sizes = (4, 12, 0, 4) if block == 4 else (3, 11, 0, 5)
  x, w, grad = inputs(sizes)
  got = jitted(f'blocks_{block}')(x, w, jnp.asarray(sizes, jnp.int32), grad)
  want = multiply_oracle(x, w, sizes), *gradients_oracle(x, w, sizes, grad)
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_bfloat16_sums_in_float32():
  sizes = (0, 24)
  x, w, grad = (jnp.asarray(a, jnp.bfloat16) for a in inputs(sizes))
  out, _, grad_w = jitted('blocks_4')(x, w, jnp.asarray(sizes, jnp.int32), grad)
  assert out.dtype == grad_w.dtype == jnp.bfloat16
  arrays = [np.asarray(a, np.float64) for a in (x, w, grad)]
  want = multiply_oracle(*arrays[:2], sizes)
  want_w = gradients_oracle(arrays[0], arrays[1], sizes, arrays[2])[1]
  np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=2**-8, atol=1e-2)
  # Six blocks are summed; each sum rounded to bfloat16 would be off by far more than once.
  np.testing.assert_allclose(np.asarray(grad_w, np.float64), want_w, rtol=2**-8, atol=1e-5)


def test_block_groups():
  sizes = jnp.asarray([0, 8, 4, 0, 4], jnp.int32)
  groups, used = block_groups(sizes, 4, 6)
  assert int(used) == 4
  np.testing.assert_array_equal(groups[:4], [1, 1, 2, 4])
  assert int(jnp.max(groups)) < 5
