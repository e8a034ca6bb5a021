"""The two-level router against loops; nothing of the future, nothing of other documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.moe.interface import Limits
from deepseek_jax.layers.moe.router.expert_attention import ExpertAttention

E, K, DIM = 7, 3, 5


def oracle(variables, x, segments):
  """Softmax scores [N, E] of every token, in float64."""
  p = {name: np.asarray(a, np.float64) for name, a in variables['params'].items()}
  keys = p['embedding'] @ p['key']
  scores = []
  for b, row in enumerate(x.astype(np.float64)):
    for t, token in enumerate(row):
      own = [row[s] for s in range(t + 1) if segments[b, s] == segments[b, t]]
      query = np.concatenate([token, np.mean(own, axis=0)]) @ p['query']
      logits = keys @ query / np.sqrt(DIM)
      scores.append(np.exp(logits) / np.exp(logits).sum())
  return np.array(scores)


@pytest.mark.parametrize('allowed', [None, {0, 2, 5}])
def test_equals_the_oracle(setup, choose, weigh, allowed):
  config = ExpertAttention(dim=DIM, scale=1.7)
  variables, x, context, apply = setup(config, E, K)
  table = None if allowed is None else jnp.array([e in allowed for e in range(E)])
  got = apply(variables, x, context, Limits(allowed=table))
  scores = oracle(variables, x, context.segments)
  if allowed is not None:
    scores[:, [e for e in range(E) if e not in allowed]] = 0
    scores /= scores.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(got.scores, scores, rtol=2e-5, atol=1e-7)
  want = choose(scores + variables['buffers']['selection_bias'], K, allowed=allowed)
  np.testing.assert_array_equal(got.experts, want)
  picked = weigh(scores, want)
  weights = 1.7 * picked / picked.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(got.weights, weights, rtol=2e-5)


def test_only_earlier_tokens_of_the_own_document_count(setup):
  variables, x, context, apply = setup(ExpertAttention(dim=DIM), E, K)
  before = apply(variables, x, context)
  scores = np.asarray(before.scores).reshape(2, 7, E)
  for place in range(7):
    changed = x.copy()
    changed[:, place] += 5.0
    after = apply(variables, changed, context)
    moved = np.any(np.asarray(after.scores).reshape(2, 7, E) != scores, axis=-1)
    there = np.arange(7) >= place
    np.testing.assert_array_equal(moved, (context.segments == context.segments[:, [place]]) & there)
    still = ~moved.reshape(-1)
    np.testing.assert_array_equal(after.experts[still], before.experts[still])
    np.testing.assert_array_equal(after.weights[still], before.weights[still])


def test_the_context_decides_too(setup):
  """The same token after other tokens goes elsewhere."""
  variables, x, context, apply = setup(ExpertAttention(dim=DIM), E, K)
  other = x.copy()
  other[:, 0] *= 20
  first, second = (
    apply(variables, given, context).experts.reshape(2, 7, K) for given in (x, other)
  )
  assert np.any(np.asarray(first)[:, 1:3] != np.asarray(second)[:, 1:3])


def test_a_cache_goes_on_where_a_block_ended(setup):
  config = ExpertAttention(dim=DIM)
  variables, x, context, apply = setup(config, E, K)
  whole = context.replace(segments=np.ones((2, 7), np.int32))
  want = apply(variables, x, whole)
  assert want.cache is None
  run = jax.jit(lambda c, x, context: config.build(E, K).apply(variables, x, context, cache=c))
  cache = config.empty_cache(2, 7, jnp.float32)
  assert cache.shape == (2, 1, DIM + 1)
  scores = []
  for start, size in ((0, 3), (3, 1), (4, 3)):
    # One place of padding at the end, with something in it.
    block = np.full((2, size + 1, 4), 9.0, np.float32)
    block[:, :size] = x[:, start : start + size]
    part = np.ones((2, size + 1), np.int32)
    part[:, size] = 0
    places = np.broadcast_to(start + np.arange(size + 1, dtype=np.int32), part.shape)
    got = run(cache, block, context.replace(tokens=part, positions=places, segments=part))
    cache = got.cache
    scores.append(np.asarray(got.scores).reshape(2, size + 1, E)[:, :size])
  np.testing.assert_allclose(np.concatenate(scores, axis=1).reshape(14, E), want.scores, rtol=1e-5)


def test_wrong_fields():
  with pytest.raises(ConfigError, match='dim'):
    ExpertAttention(dim=0)
