"""The sigmoid router: float32 whatever comes in, weights that sum to its scale."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.context import text_context
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


@pytest.mark.parametrize('fields', [{'groups': 0}, {'groups': 2, 'kept_groups': 3}])
def test_wrong_fields(fields):
  with pytest.raises(ConfigError, match='groups'):
    Sigmoid(**fields)


def test_check():
  assert Sigmoid(groups=4, kept_groups=2).check(8, 4) == []
  assert len(Sigmoid(groups=4, kept_groups=2).check(9, 4)) == 1
  assert len(Sigmoid(groups=4, kept_groups=2).check(8, 5)) == 1
