"""Attention to several modalities against one attention each, and their weights by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.ops.attention.reference import attend
from deepseek_jax.ops.fusion import attend_fused, attend_fused_reference, modality_weights


def arrays(seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  mask = jnp.asarray(rng.random((2, 5, 7)) < 0.6).at[0, 0].set(False)
  modality = jnp.asarray(rng.integers(0, 3, (2, 7)), jnp.int32)
  return normal(2, 5, 3, 4), normal(2, 7, 3, 4), normal(2, 7, 3, 6), mask, modality


def test_one_product_is_one_attention_each():
  query, key, value, mask, modality = arrays()
  weights = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 5, 4)))

  def total(function):
    return lambda *x: jnp.sum(jnp.sin(function(*x[:3], mask, modality, x[3])))

  given = (query, key, value, weights)
  np.testing.assert_allclose(
    attend_fused(query, key, value, mask, modality, weights),
    attend_fused_reference(query, key, value, mask, modality, weights),
    rtol=1e-5,
    atol=1e-6,
  )
  found, want = (
    jax.grad(total(f), argnums=(0, 1, 2, 3))(*given) for f in (attend_fused, attend_fused_reference)
  )
  for a, b in zip(found, want):
    assert np.abs(b).max() > 0
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_weights():
  """Scores of mean keys by hand; what is not there counts for nothing."""
  _, _, _, mask, modality = arrays()
  rng = np.random.default_rng(1)
  query, key = rng.normal(size=(2, 5, 8)), rng.normal(size=(2, 7, 8))
  found = modality_weights(
    jnp.asarray(query, jnp.float32), jnp.asarray(key, jnp.float32), mask, modality, 5
  )
  for b, t in np.ndindex(2, 5):
    want = np.zeros(5)
    for m in range(5):
      seen = [s for s in range(7) if mask[b, t, s] and modality[b, s] == m]
      if seen:
        want[m] = np.exp(query[b, t] @ key[b, seen].mean(axis=0) / np.sqrt(8))
    want /= want.sum() or 1
    np.testing.assert_allclose(found[b, t], want, rtol=1e-4, atol=1e-6)
  assert not found[0, 0].any()


def test_one_modality_alone_counts_in_full():
  query, key, value, mask, _ = arrays()
  alone = jnp.full((2, 7), 2, jnp.int32)
  mask = mask.at[0, 0, 0].set(True)
  weights = modality_weights(query[:, :, 0], key[:, :, 0], mask, alone, 5)
  np.testing.assert_allclose(weights[..., 2], 1.0, rtol=1e-6)
  found = attend_fused(query, key, value, mask, alone, weights)
  np.testing.assert_allclose(
    found, attend(query, key, value, mask, scale=0.5), rtol=1e-5, atol=1e-6
  )


def test_what_is_masked_has_a_finite_gradient():
  query, key, value, mask, modality = arrays()
  nothing = jnp.zeros_like(mask)

  def total(query, key):
    weights = modality_weights(query[:, :, 0], key[:, :, 0], nothing, modality, 3)
    return jnp.sum(attend_fused(query, key, value, nothing, modality, weights))

  assert total(query, key) == 0
  for gradient in jax.grad(total, argnums=(0, 1))(query, key):
    assert not np.asarray(gradient).any()
