"""RMS norm and SwiGLU against float64 arithmetic."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.ops.norm import rms_norm, swiglu


def rms_norm_oracle(x, scale, epsilon):
  x, scale = x.astype(np.float64), scale.astype(np.float64)
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


@pytest.mark.parametrize('epsilon', [1e-6, 0.5])
def test_rms_norm(epsilon):
  rng = np.random.default_rng(0)
  x = (3 * rng.standard_normal((2, 5, 7))).astype(np.float32)
  scale = rng.standard_normal(7).astype(np.float32)
  got = rms_norm(jnp.asarray(x), jnp.asarray(scale), epsilon)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, rms_norm_oracle(x, scale, epsilon), rtol=2e-6, atol=1e-6)


def test_rms_norm_of_zeros_is_zero_with_finite_gradient():
  value, grad = jax.value_and_grad(lambda x: jnp.sum(rms_norm(x, jnp.ones(3))))(jnp.zeros(3))
  assert value == 0
  assert np.all(np.isfinite(grad))


def test_rms_norm_is_float32_inside():
  # In bfloat16 the square of 200 is off by more than the last digit of the result.
  x = np.array([200.0, 1.0, -3.0, 0.5] * 8).astype(ml_dtypes.bfloat16)
  scale = np.linspace(0.9, 1.1, 32).astype(np.float32)
  got = rms_norm(jnp.asarray(x), jnp.asarray(scale))
  assert got.dtype == jnp.bfloat16
  want = rms_norm_oracle(x, scale, 1e-6)
  # One rounding: half a unit in the last place of 8 bits.
  np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8)


def swiglu_oracle(gate, up):
  gate, up = gate.astype(np.float64), up.astype(np.float64)
  return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize(('dtype', 'tolerance'), [(np.float32, 1e-6), (ml_dtypes.bfloat16, 2**-8)])
def test_swiglu(dtype, tolerance):
  rng = np.random.default_rng(1)
  gate, up = ((4 * rng.standard_normal((3, 11))).astype(dtype) for _ in range(2))
  got = swiglu(jnp.asarray(gate), jnp.asarray(up))
  assert got.dtype == dtype
  want = swiglu_oracle(gate, up)
  np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=1e-6)
