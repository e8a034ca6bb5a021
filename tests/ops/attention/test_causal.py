"""Attention in blocks of queries against plain attention, forward and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.attention.causal import attend_causal
from deepseek_jax.ops.attention.reference import attend, visible, window_mask

B, H, K, V = 2, 3, 6, 4


def inputs(length, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
  segments = np.sort(rng.integers(1, 4, (B, length)), axis=1).astype(np.int32)
  index = np.arange(length, dtype=np.int32)
  starts = np.stack([np.searchsorted(row, row) for row in segments]).astype(np.int32)
  positions = jnp.asarray(index - starts)
  mask = visible(positions, positions, jnp.asarray(segments), jnp.asarray(segments))
  arrays = (draw(B, length, H, K), draw(B, length, H, K), draw(B, length, H, V))
  return arrays, mask, positions, draw(B, length, H, V)


def both(function, arrays, grad):
  @jax.jit
  def run(*arrays):
    out, back = jax.vjp(function, *arrays)
    return out, *back(grad)

  return run(*arrays)


@pytest.mark.parametrize('length', [1, 7, 37, 45])
@pytest.mark.parametrize('window', [None, 5])
def test_equals_reference(length, window):
  arrays, mask, positions, grad = inputs(length)
  if window is not None:
    mask &= window_mask(positions, positions, window, 1)
  got = both(lambda q, k, v: attend_causal(q, k, v, mask, 0.7), arrays, grad)
  want = both(lambda q, k, v: attend(q, k, v, mask, scale=0.7), arrays, grad)
  assert len(got) == 4
  for a, b in zip(got, want, strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def test_bfloat16():
  arrays, mask, _, grad = inputs(37, jnp.bfloat16)
  got = both(lambda q, k, v: attend_causal(q, k, v, mask, 0.7), arrays, grad)
  exact = [x.astype(jnp.float32) for x in arrays]
  want = both(lambda q, k, v: attend(q, k, v, mask, scale=0.7), exact, grad.astype(jnp.float32))
  for a, b in zip(got, want, strict=True):
    assert a.dtype == jnp.bfloat16
    assert float(jnp.max(jnp.abs(a.astype(jnp.float32) - b))) < 0.03 * float(jnp.max(jnp.abs(b)))


def test_gradient_keeps_no_weights():
  """The residuals are [B, T, …]: nothing is [B, H, T, T]."""
  arrays, mask, _, _ = inputs(45)
  _, back = jax.vjp(lambda q, k, v: attend_causal(q, k, v, mask, 0.7), *arrays)
  sizes = [x.size for x in jax.tree.leaves(back) if x.dtype == jnp.float32]
  assert sizes
  assert max(sizes) < B * H * 45 * 45
