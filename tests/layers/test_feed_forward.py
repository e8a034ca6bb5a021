"""The dense feed-forward layer and the norm before it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.context import text_context
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.norm import RMSNorm


def test_swiglu():
  module = SwiGLU(hidden=5).build()
  x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
  context = text_context(jnp.zeros((2, 3), jnp.int32))
  params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), x, context))['params']
  got = jax.jit(module.apply)({'params': params}, x, context)
  w = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  gate = x @ w['gate']
  want = (gate / (1 + np.exp(-gate)) * (x @ w['up'])) @ w['down']
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_norm_has_one_scale_a_channel():
  module = RMSNorm(epsilon=1e-3).build()
  x = jnp.asarray([[3.0, 4.0, 0.0]])
  params = {'params': {'scale': jnp.asarray([1.0, 2.0, 5.0])}}
  size = np.sqrt(25 / 3 + 1e-3)
  np.testing.assert_allclose(module.apply(params, x), [[3 / size, 8 / size, 0]], rtol=1e-6)


def test_wrong_fields():
  with pytest.raises(ConfigError, match='hidden'):
    SwiGLU(hidden=0)
  with pytest.raises(ConfigError, match='epsilon'):
    RMSNorm(epsilon=0.0)
