"""The sigmoid router: float32 whatever comes in, weights that sum to its scale."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.context import text_context
from deepseek_jax.layers.moe.interface import Limits
from deepseek_jax.layers.moe.router.sigmoid import Sigmoid


def test_weights_sum_to_the_scale_and_come_in_float32():
  config = Sigmoid(groups=2, kept_groups=1, scale=2.5)
  module = config.build(6, 2)
  x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
  context = text_context(jnp.zeros((2, 3), jnp.int32))
  variables = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), x, context))
  run = jax.jit(module.apply)
  got = run(variables, jnp.asarray(x, jnp.bfloat16), context)
  assert got.experts.shape == (6, 2)
  assert got.weights.dtype == got.scores.dtype == jnp.float32
  np.testing.assert_allclose(jnp.sum(got.weights, axis=1), 2.5, rtol=1e-6)
  # Both chosen experts are of one group.
  np.testing.assert_array_equal(got.experts[:, 0] // 3, got.experts[:, 1] // 3)
  wide = run(variables, jnp.asarray(jnp.asarray(x, jnp.bfloat16), jnp.float32), context)
  np.testing.assert_array_equal(got.scores, wide.scores)


def test_a_large_bias_decides_and_leaves_the_scores():
  module = Sigmoid(scale=1.0).build(4, 1)
  x = np.random.default_rng(1).standard_normal((1, 5, 4)).astype(np.float32)
  context = text_context(jnp.zeros((1, 5), jnp.int32))
  variables = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), x, context))
  run = jax.jit(module.apply)
  before = run(variables, x, context)
  assert len(set(np.asarray(before.experts).ravel().tolist())) > 1
  variables['buffers']['selection_bias'] = jnp.array([0.0, 0.0, 5.0, 0.0])
  after = run(variables, x, context)
  np.testing.assert_array_equal(after.experts, 2)
  np.testing.assert_array_equal(after.scores, before.scores)
  # One expert alone has all the weight, whatever the bias.
  np.testing.assert_allclose(after.weights, 1.0, rtol=1e-6)


def test_golden(golden):
  i = np.arange(1, 17)
  config = Sigmoid(groups=4, kept_groups=2, scale=2.5)
  got = golden(config, 2 * np.sin(i), 0.1 * np.cos(i), 4)
  np.testing.assert_array_equal(got.experts, [[0, 7, 6, 1]])
  np.testing.assert_allclose(got.weights, [[0.625512, 0.651659, 0.584630, 0.638199]], atol=2e-6)


def two_best(values):
  return sum(sorted(values, reverse=True)[:2])


@pytest.mark.parametrize('allowed', [None, {0, 2, 3, 7}])
@pytest.mark.parametrize('config', [Sigmoid(), Sigmoid(groups=4, kept_groups=2, scale=1.0)])
def test_equals_the_oracle(setup, choose, weigh, config, allowed):
  variables, x, context, apply = setup(config, 8, 3)
  table = None if allowed is None else jnp.array([e in allowed for e in range(8)])
  got = apply(variables, x, context, Limits(allowed=table, top_k=jnp.int32(2)))
  logits = x.reshape(-1, 4).astype(np.float64) @ np.asarray(variables['params']['weight'])
  scores = 1 / (1 + np.exp(-logits))
  selection = scores + variables['buffers']['selection_bias']
  want = choose(selection, 3, config.groups, config.kept_groups, two_best, allowed, count=2)
  np.testing.assert_array_equal(got.experts, want)
  assert np.all(want[:, 2] == 8)
  picked = weigh(scores, want)
  weights = config.scale * picked / picked.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(got.weights, weights, rtol=1e-5)
  if allowed is None:
    np.testing.assert_allclose(got.logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('fields', [{'groups': 0}, {'groups': 2, 'kept_groups': 3}])
def test_wrong_fields(fields):
  with pytest.raises(ConfigError, match='groups'):
    Sigmoid(**fields)


def test_check():
  assert Sigmoid(groups=4, kept_groups=2).check(8, 4) == []
  assert len(Sigmoid(groups=4, kept_groups=2).check(9, 4)) == 1
  assert len(Sigmoid(groups=4, kept_groups=2).check(8, 5)) == 1
