"""Attention in both directions against its float64 twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.bidirectional import Bidirectional
from deepseek_jax.layers.attention.interface import AttentionConfig

CONFIG = Bidirectional(heads=3, head_dim=5)


def oracle(params, config, x, segments):
  """Returns [B, T, D], one query and head at a time."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x = np.asarray(x, np.float64)
  query, key, value = (np.einsum('btd,dhk->bthk', x, p[n]) for n in ('query', 'key', 'value'))
  out = np.zeros(x.shape)
  for b, t in np.ndindex(x.shape[:2]):
    seen = [s for s in range(x.shape[1]) if segments[b, s] == segments[b, t]]
    for h in range(config.heads):
      scores = np.array([query[b, t, h] @ key[b, s, h] for s in seen]) / np.sqrt(config.head_dim)
      weights = np.exp(scores - scores.max())
      mixed = sum(w * value[b, s, h] for w, s in zip(weights / weights.sum(), seen))
      out[b, t] += mixed @ p['output'][h]
  return out


def test_every_token_of_a_segment_is_seen(packed, build):
  params, run = build(CONFIG)
  x, context = packed
  want = oracle(params, CONFIG, x, context.segments)
  np.testing.assert_allclose(np.asarray(run(params, x, context)), want, rtol=1e-4, atol=1e-5)


def test_later_tokens_are_seen_and_other_documents_are_not(packed, build):
  params, run = build(CONFIG)
  x, context = packed
  changed = x.copy()
  changed[0, 3] += 5.0
  moved = np.abs(np.asarray(run(params, changed, context)) - np.asarray(run(params, x, context)))
  moved = moved.max(axis=-1)
  assert (moved[0, :4] > 1e-4).all()
  assert not moved[0, 4:].any()
  assert not moved[1].any()


def test_flops():
  # Two products of 3 heads of 5 channels with each of 7 tokens.
  assert CONFIG.mixing_flops(7) == 2 * 2 * 3 * 5 * 7


def test_there_is_no_cache(packed, build):
  assert isinstance(CONFIG, AttentionConfig)
  for call in (lambda: CONFIG.empty_cache(1, 2, jnp.float32), CONFIG.cache_axes):
    with pytest.raises(ConfigError, match='no cache'):
      call()
  x, context = packed
  with pytest.raises(ConfigError, match='no cache'):
    CONFIG.build().init(jax.random.key(0), x, context, ())


def test_wrong_fields():
  with pytest.raises(ConfigError) as caught:
    Bidirectional(heads=0, head_dim=0)
  assert len(caught.value.messages) == 2
