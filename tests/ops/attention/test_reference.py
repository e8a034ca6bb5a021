"""Masks and plain attention against explicit loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.attention.reference import (
  MASKED,
  Seen,
  attend,
  attend_latent,
  attend_seen,
  keep_highest,
  kept_counts,
  visible,
  window_mask,
)

B, T, S, H, K, V = 2, 3, 5, 2, 4, 3


def softmax_rows(scores, mask):
  """float64 softmax over the visible keys of one query."""
  weights = np.where(mask, np.exp(scores - np.max(scores[mask])), 0.0)
  return weights / np.sum(weights)


def attend_oracle(query, key, value, mask, scale, bias):
  query, key, value = (x.astype(np.float64) for x in (query, key, value))
  out = np.zeros((*query.shape[:3], value.shape[-1]))
  for b in range(query.shape[0]):
    for t in range(query.shape[1]):
      for h in range(query.shape[2]):
        scores = key[b, :, h] @ query[b, t, h] * scale
        if bias is not None:
          scores = scores + bias[b, t]
        out[b, t, h] = softmax_rows(scores, mask[b, t]) @ value[b, :, h]
  return out


def random_mask(rng):
  mask = rng.random((B, T, S)) < 0.5
  mask[:, :, 1] = True
  assert not mask.all()
  return mask


@pytest.mark.parametrize('biased', [False, True])
def test_attend(biased):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  query, key, value = draw(B, T, H, K), draw(B, S, H, K), draw(B, S, H, V)
  mask, bias = random_mask(rng), draw(B, T, S) if biased else None
  got = attend(*map(jnp.asarray, (query, key, value, mask)), scale=0.7, bias=bias)
  assert got.dtype == jnp.float32
  want = attend_oracle(query, key, value, mask, 0.7, bias)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('biased', [False, True])
def test_attend_latent(biased):
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  query, query_rope = draw(B, T, H, K), draw(B, T, H, 2)
  latent, key_rope = draw(B, S, K), draw(B, S, 2)
  mask, bias = random_mask(rng), draw(B, T, S) if biased else None
  arrays = map(jnp.asarray, (query, query_rope, latent, key_rope, mask))
  got = attend_latent(*arrays, scale=0.7, bias=bias)
  # The same as ordinary attention whose heads share one key and one value.
  both = np.concatenate([latent, key_rope], axis=-1)[:, :, None].repeat(H, axis=2)
  want = attend_oracle(
    np.concatenate([query, query_rope], axis=-1),
    both,
    latent[:, :, None].repeat(H, axis=2),
    mask,
    0.7,
    bias,
  )
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('groups', [1, 2, 4])
@pytest.mark.parametrize('extra', ['none', 'all'])
def test_attend_seen(groups, extra):
  heads, batch = 4, 2
  rng = np.random.default_rng(3)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  query = draw(batch, T, heads, K)
  key, value = draw(batch, S, groups, K), draw(batch, S, groups, V)
  seen = Seen(
    np.array([[2, 3, 0], [4, 1, 2]], np.int32),
    np.array([[0, 1, 2, 3, -1], [0, 1, 2, 3, 4]], np.int32),
    np.array([[1, 1, 2], [1, 1, 2]], np.int32),
    np.array([[1, 1, 1, 1, 2], [1, 1, 1, 1, 1]], np.int32),
  )
  bias = sinks = window = None
  if extra == 'all':
    bias, sinks, window = draw(batch, S), draw(heads), (2, 1)
  run = lambda q, k, v: attend_seen(  # noqa: E731
    q, k, v, seen, scale=0.7, key_bias=bias, sinks=sinks, window=window
  )
  got = run(*map(jnp.asarray, (query, key, value)))
  want = np.zeros((batch, T, heads, V))
  for b, t, h in np.ndindex(batch, T, heads):
    total = 0.0 if sinks is None else np.exp(float(sinks[h]))
    for s in range(S):
      q_place, k_place = seen.query_positions[b, t], seen.key_positions[b, s]
      near = window is None or q_place - k_place < 2 or k_place < 1
      same = seen.query_segments[b, t] == seen.key_segments[b, s]
      if same and 0 <= k_place <= q_place and near:
        group = h * groups // heads
        score = query[b, t, h].astype(float) @ key[b, s, group] * 0.7
        weight = np.exp(score + (0.0 if bias is None else bias[b, s]))
        total += weight
        want[b, t, h] += weight * value[b, s, group]
    want[b, t, h] /= max(total, 1e-30)
  # The last query of each row sees nothing.
  assert not want[:, 2].any()
  assert want[:, :2].all()
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  grads = jax.grad(lambda *a: jnp.sum(run(*a)), argnums=(0, 1, 2))(query, key, value)
  assert all(np.all(np.isfinite(g)) for g in grads)
  assert not np.any(grads[0][:, 2])
  assert np.any(grads[0][:, :2])


def test_attend_in_bfloat16_scores_in_float32():
  # Two scores that differ by less than a bfloat16 of their size must not get equal weights.
  query = jnp.full((1, 1, 1, 64), 2.0, jnp.bfloat16)
  key = jnp.stack([jnp.full(64, 2.0), jnp.full(64, 2.0).at[0].set(2.25)]).astype(jnp.bfloat16)
  value = jnp.array([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
  mask = jnp.ones((1, 1, 2), bool)
  got = attend(query, key.reshape(1, 2, 1, 64), value, mask, scale=1.0)
  assert got.dtype == jnp.bfloat16
  assert float(got[0, 0, 0, 0]) == pytest.approx(1 / (1 + np.exp(-0.5)), abs=2**-8)


def test_a_query_that_sees_nothing_is_finite_with_finite_gradient():
  query = jnp.ones((1, 1, 1, 2))
  key, value = jnp.ones((1, 3, 1, 2)), jnp.arange(3.0).reshape(1, 3, 1, 1)
  mask = jnp.zeros((1, 1, 3), bool)
  run = lambda q, k, v: jnp.sum(attend(q, k, v, mask, scale=1.0))  # noqa: E731
  out, grads = jax.value_and_grad(run, argnums=(0, 1, 2))(query, key, value)
  assert np.isfinite(out)
  assert all(np.all(np.isfinite(g)) for g in grads)
  assert np.isfinite(np.float32(MASKED))


def test_visible():
  positions = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 0]], np.int32)
  segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 0]], np.int32)
  got = visible(positions, positions, segments, segments)
  for b in range(2):
    for t in range(6):
      for s in range(6):
        same = segments[b, t] == segments[b, s]
        assert got[b, t, s] == (same and positions[b, s] <= positions[b, t])


def test_visible_without_segments_skips_empty_slots():
  query, key = np.array([[2, 3]], np.int32), np.array([[0, -1, 3, 2, 4]], np.int32)
  want = [[[True, False, False, True, False], [True, False, True, True, False]]]
  np.testing.assert_array_equal(visible(query, key), want)


@pytest.mark.parametrize(('size', 'sinks'), [(1, 0), (3, 0), (3, 2), (2, 5), (50, 1)])
def test_window_mask(size, sinks):
  query = np.array([[0, 1, 2, 7, 8, 9]], np.int32)
  key = np.array([[0, 1, 2, 3, 5, 6, 7, 8, 9]], np.int32)
  got = window_mask(query, key, size, sinks)
  for t, q in enumerate(query[0]):
    for s, k in enumerate(key[0]):
      # The window is the `size` positions q - size + 1 … q.
      assert got[0, t, s] == (k in range(q - size + 1, 100) or k in range(sinks))


def keep_oracle(scores, mask, counts):
  kept = np.zeros_like(mask)
  for b, t in np.ndindex(mask.shape[:2]):
    keys = np.flatnonzero(mask[b, t])
    if len(keys):
      best = sorted(keys, key=lambda s: -scores[b, s])[: counts[len(keys)]]
      kept[b, t, best] = True
  return kept


@pytest.mark.parametrize('keep', [0.01, 0.3, 0.5, 1.0])
def test_keep_highest(keep):
  rng = np.random.default_rng(2)
  scores = rng.standard_normal((2, 9)).astype(np.float32)
  mask = np.tril(np.ones((2, 9, 9), bool))
  mask[1, :, 2] = False
  mask[1, 4] = False
  got = keep_highest(jnp.asarray(scores), jnp.asarray(mask), keep)
  counts = [max(-(-round(n * keep * 1000) // 1000), 1) for n in range(10)]
  want = keep_oracle(scores, mask, counts)
  np.testing.assert_array_equal(got, want)
  if keep == 1.0:
    np.testing.assert_array_equal(got, mask)


def test_keep_highest_keeps_ties():
  scores = jnp.array([[1.0, 2.0, 2.0, 0.0]])
  got = keep_highest(scores, jnp.ones((1, 1, 4), bool), 0.25)
  np.testing.assert_array_equal(got, [[[False, True, True, False]]])


def test_kept_counts_are_exact_where_the_share_is_whole():
  # 50 × 0.3 is above 15 in float32; 10 × 0.7 is below 7 in float64 sums of tenths.
  for percent in (10, 30, 70, 90):
    got = kept_counts(percent / 100, 200)
    want = [max(-(-n * percent // 100), 1) for n in range(201)]
    np.testing.assert_array_equal(got, want)
