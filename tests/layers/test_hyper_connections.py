"""Hyper-connections in a whole model: where they start, and that every part of it bears lanes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.context import text_context
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.hyper_connections import HyperConnections
from deepseek_jax.layers.residual import Add
from deepseek_jax.models.decoder import init_variables, plan_segments
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.mtp import MTP
from deepseek_jax.models.stack import empty_caches

DEPTH = 3
LANE_PARTS = ('attention_residual', 'feed_forward_residual', 'close')


def family(residual):
  return DeepSeekV3(
    depth=DEPTH,
    width=12,
    vocab=17,
    attention=MLA(heads=2, nope_dim=4, rope_dim=2, value_dim=3, latent=5),
    dense=SwiGLU(hidden=6),
    feed_forward=SwiGLU(hidden=10),
    mtp=MTP(depth=1),
    residual=residual,
  )


def fresh(model):
  boxed = jax.jit(lambda key: init_variables(model.build(), key))(jax.random.key(1))
  return nn.meta.unbox(boxed)['params']


def without_lanes(tree):
  """The parameters that the plain residual has too."""
  if not isinstance(tree, dict):
    return tree
  return {k: without_lanes(v) for k, v in tree.items() if k not in LANE_PARTS}


def outputs(model, params, tokens):
  decoder = model.build()

  context = text_context(tokens)
  return jax.jit(lambda p: decoder.apply({'params': p}, context, method='every_depth'))(params)


def test_a_model_starts_as_the_plain_residual():
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 17, (2, 7)), jnp.int32)
  lanes = family(HyperConnections(keep=0.6))
  params = fresh(lanes)
  want = outputs(family(Add()), without_lanes(params), tokens)
  got = outputs(lanes, params, tokens)
  exact = jax.tree_util.tree_map_with_path(
    lambda path, leaf: 0 * leaf if path[-1].key == 'gates' else leaf, params
  )
  for a, b, c in zip(got, outputs(lanes, exact, tokens), want, strict=True):
    # MTP too: it opens and closes a stream of its own.
    np.testing.assert_allclose(b, c, rtol=1e-3, atol=1e-4)
    assert 1e-4 < np.max(np.abs(a - c)) < 0.1 * np.max(np.abs(c))


@pytest.fixture(scope='module')
def drawn():
  """A model with lanes whose weights are far from their start."""
  model = family(HyperConnections(lanes=3, iterations=4))
  boxed = jax.eval_shape(lambda key: init_variables(model.build(), key), jax.random.key(0))
  rng = np.random.default_rng(2)

  def draw(path, leaf):
    std = 1 if path[-1].key in ('base', 'gates') else leaf.shape[-2:][0] ** -0.5
    start = 1 if path[-1].key == 'scale' else 0
    return (start + (0.2 if start else std) * rng.standard_normal(leaf.shape)).astype(np.float32)

  return model, jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(boxed)['params'])


def test_every_weight_has_a_gradient(drawn):
  model, params = drawn
  tokens = jnp.asarray(np.random.default_rng(1).integers(0, 17, (2, 7)), jnp.int32)

  def loss(params):
    return sum(jnp.sum(jnp.sin(3 * x)) for x in outputs(model, params, tokens))

  grads = jax.jit(jax.grad(loss))(params)
  found = {path[-2].key for path, _ in jax.tree_util.tree_leaves_with_path(grads)}
  assert {'mixer', 'head'} <= found
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    name = jax.tree_util.keystr(path)
    assert np.isfinite(leaf).all(), name
    # The logits are not made here.
    assert np.max(np.abs(leaf)) > 1e-6 or 'weight' in name, name


def test_stream_and_parameters(drawn):
  model, params = drawn
  residual = model.residual
  x = jnp.ones((2, 5, 12))
  stream = residual.build().apply({}, x, method='open')
  assert stream.shape == (2, 5, 3, 12)
  assert len(residual.stream_axes) == stream.ndim
  block = params['stack']['segment_0']['block_0']['attention_residual']['mixer']
  assert {k: v.shape for k, v in block.items()} == {
    'matrix': (36, 15),
    'base': (15,),
    'gates': (3,),
  }
  head = params['close']['head']
  assert {k: v.shape for k, v in head.items()} == {'matrix': (36, 3), 'base': (3,), 'gates': (1,)}
  assert 'open' not in params


def test_decode_equals_forward(drawn):
  model, params = drawn
  decoder, tokens = model.build(), jnp.arange(7, dtype=jnp.int32)[None]
  context = text_context(tokens)
  want, _ = decoder.apply({'params': params}, context)
  caches = empty_caches(plan_segments(model), 1, 7, jnp.float32)
  step = jax.jit(lambda context, caches: decoder.apply({'params': params}, context, caches))
  for start, end in ((0, 4), (4, 5), (5, 6), (6, 7)):
    part = jax.tree.map(lambda x, s=start, e=end: x[:, s:e], context)
    got, caches = step(part, caches)
    np.testing.assert_allclose(got, want[:, start:end], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
  ('field', 'value'), [('lanes', 1), ('iterations', 0), ('epsilon', 0), ('gate', 0), ('keep', 1)]
)
def test_wrong_fields(field, value):
  with pytest.raises(ConfigError, match=field):
    dataclasses.replace(HyperConnections(), **{field: value})
