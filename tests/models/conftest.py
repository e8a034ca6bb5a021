"""A V3 small enough to compile in a moment, with weights away from their start."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.balance import SequenceBalance
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.decoder import canonical, init_variables, plan_segments
from deepseek_jax.models.deepseek_v3 import DeepSeekV3


@pytest.fixture(scope='session')
def tiny() -> Callable[..., DeepSeekV3]:
  """Makes a tiny V3 of one dense and `depth` - 1 sparse layers."""

  def make(depth: int = 3, **changes: Any) -> DeepSeekV3:
    model = DeepSeekV3(
      depth=depth,
      width=8,
      vocab=13,
      attention=MLA(heads=2, nope_dim=4, rope_dim=2, value_dim=3, latent=5),
      dense=SwiGLU(hidden=6),
      feed_forward=MoE(experts=4, top_k=2, hidden=3, balance=SequenceBalance(weight=0.1)),
    )
    return dataclasses.replace(model, **changes)

  return make


@pytest.fixture(scope='session')
def context() -> Context:
  """Two packed rows of 9 tokens: two documents and padding; one document."""
  tokens = np.random.default_rng(0).integers(3, 13, (2, 9)).astype(np.int32)
  tokens[0, 7:] = 0
  positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8]], np.int32)
  segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 9], np.int32)
  return Context(
    tokens=jnp.asarray(tokens), positions=jnp.asarray(positions), segments=jnp.asarray(segments)
  )


@pytest.fixture(scope='session')
def canonical_variables() -> Callable[[DeepSeekV3], dict[str, Any]]:
  """Makes `params` and `buffers` with layers at their canonical addresses, all of them random."""

  def make(model: DeepSeekV3) -> dict[str, Any]:
    decoder = model.build()
    shapes = nn.meta.unbox(jax.eval_shape(lambda k: init_variables(decoder, k), jax.random.key(0)))
    rng = np.random.default_rng(1)

    def fill(leaf):
      draw = rng.standard_normal(leaf.shape).astype(np.float32)
      return 1 + 0.2 * draw if leaf.shape[-1:] == leaf.shape else draw / np.sqrt(leaf.shape[-2])

    params = jax.tree.map(fill, shapes['params'])
    buffers = jax.tree.map(lambda leaf: 0.1 * np.cos(np.arange(leaf.size)), shapes['buffers'])
    buffers = jax.tree.map(
      lambda x, leaf: x.reshape(leaf.shape).astype(np.float32), buffers, shapes['buffers']
    )
    segments = plan_segments(model)
    return {
      'params': canonical(params, segments),
      'buffers': canonical(buffers, segments),
    }

  return make
