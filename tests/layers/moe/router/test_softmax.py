"""The softmax router: raw probabilities, and groups by their best expert."""

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.moe.interface import Limits
from deepseek_jax.layers.moe.router.softmax import Softmax


def probabilities(logits, allowed=None):
  exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
  if allowed is not None:
    exponents[:, [e for e in range(logits.shape[1]) if e not in allowed]] = 0
  return exponents / exponents.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
  ('config', 'experts', 'top_k'),
  [
    (Softmax(), 5, 2),
    (Softmax(groups=4, kept_groups=2, scale=16.0), 12, 3),
    (Softmax(groups=8, kept_groups=3, scale=16.0), 16, 6),
  ],
)
@pytest.mark.parametrize('allowed', [None, {0, 2, 3}])
def test_equals_the_oracle(setup, choose, weigh, config, experts, top_k, allowed):
  variables, x, context, apply = setup(config, experts, top_k)
  assert set(variables) == {'params'}, 'no bias'
  table = None if allowed is None else jnp.array([e in allowed for e in range(experts)])
  got = apply(variables, x, context, Limits(allowed=table))
  logits = x.reshape(-1, 4).astype(np.float64) @ np.asarray(variables['params']['weight'])
  scores = probabilities(logits, allowed)
  want = choose(scores, top_k, config.groups, config.kept_groups, max, allowed)
  np.testing.assert_array_equal(got.experts, want)
  np.testing.assert_allclose(got.weights, config.scale * weigh(scores, want), rtol=1e-5)
  np.testing.assert_allclose(got.scores, scores, rtol=1e-5)
  assert got.weights.dtype == got.logits.dtype == jnp.float32
  if allowed is None:
    np.testing.assert_allclose(got.logits, logits, rtol=1e-4, atol=1e-5)
    assert np.all(np.asarray(got.weights).sum(axis=1) < config.scale), 'not renormalised'


def test_a_group_is_as_good_as_its_best_expert(golden):
  # The first group has the larger sum of its two best, the second the best expert.
  logits = np.log([0.28, 0.26, 0.06, 0.40])
  got = golden(Softmax(groups=2, kept_groups=1), logits, None, 2)
  np.testing.assert_array_equal(got.experts, [[3, 2]])
  np.testing.assert_allclose(got.weights, [[0.40, 0.06]], rtol=1e-5)
  free = golden(Softmax(), logits, None, 2)
  np.testing.assert_array_equal(free.experts, [[3, 0]])


@pytest.mark.parametrize('fields', [{'groups': 0}, {'groups': 2, 'kept_groups': 3}])
def test_wrong_fields(fields):
  with pytest.raises(ConfigError, match='groups'):
    Softmax(**fields)


def test_check():
  assert Softmax(groups=8, kept_groups=3).check(160, 6) == []
  assert len(Softmax(groups=8, kept_groups=3).check(159, 6)) == 1
  assert len(Softmax(groups=8, kept_groups=3).check(16, 7)) == 1
