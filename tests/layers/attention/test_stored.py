"""Keys that are rounded as caches would hold them: golden values, where, and with what gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.csa import CSA
from deepseek_jax.layers.attention.hca import HCA
from deepseek_jax.layers.attention.indexer import Indexer
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.shared_window import SharedWindow
from deepseek_jax.layers.attention.sparse import DSA
from deepseek_jax.layers.attention.stored import V4, Float4, Float8, Hadamard, Stored
from deepseek_jax.layers.context import Context, text_context

WAVE = 3 * np.sin(np.arange(1, 129, dtype=np.float32))
SMALL = Stored(key=Float8(group=8), index=Float8(group=8))
LATENT = {'heads': 2, 'nope_dim': 6, 'rope_dim': 4, 'value_dim': 5, 'latent': 12}
SHARED = {
  'heads': 4,
  'head_dim': 20,
  'rope_dim': 4,
  'query_latent': 12,
  'groups': 2,
  'group_dim': 8,
  'window': 4,
}
INDEX = {'index_heads': 16, 'index_dim': 8, 'top_k': 3, 'ratio': 4}
KINDS = {
  'mla': lambda stored: MLA(**LATENT, stored=stored),
  'dsa': lambda stored: DSA(**LATENT, top_k=5, indexer=Indexer(heads=16, dim=8), stored=stored),
  'window': lambda stored: SharedWindow(**SHARED, stored=stored),
  'csa': lambda stored: CSA(**SHARED, **INDEX, stored=stored),
  'hca': lambda stored: HCA(**SHARED, ratio=4, stored=stored),
}


@pytest.fixture(scope='module', autouse=True)
def _hurry():
  """Programs that run once: more time goes into compiling than into running."""
  before = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', before)


def numbers(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_golden_values():
  """Of 3 sin(i): what the released kernels of V4 give."""
  want = [2.5, 2.75, 0.4375, -2.25, -3, -0.8125, 2, 3]
  np.testing.assert_array_equal(Float8().round(jnp.asarray(WAVE)[None])[0, :8], want)
  want = [3, 3, 0.5, -2, -3, -0.75, 2, 3]
  np.testing.assert_array_equal(Float4().round(jnp.asarray(WAVE[:32])[None])[0, :8], want)


def test_hadamard():
  """Sylvester's order; scores of rotated vectors are those of the vectors."""
  first = Hadamard().rotate(jnp.eye(4, dtype=jnp.float32))
  want = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
  np.testing.assert_allclose(first, want, atol=1e-7)
  a, b = numbers(5, 128), numbers(7, 128, seed=1)
  turned = Hadamard().rotate(a) @ Hadamard().rotate(b).T
  np.testing.assert_allclose(turned, a @ b.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', [Float8(group=16), Float4()])
def test_the_gradient_takes_no_notice(kind, dtype):
  x = jnp.asarray(numbers(3, 64), dtype)
  y, pull = jax.vjp(kind.round, x)
  assert y.dtype == x.dtype
  assert 0 < np.max(np.abs(np.asarray(y - x, np.float32))) < 0.5
  np.testing.assert_array_equal(kind.round(y), y)
  (slope,) = pull(x)
  np.testing.assert_array_equal(slope, x)


def start(config, x):
  """Returns weights of a layer."""
  context = text_context(jnp.ones(x.shape[:2], jnp.int32))
  return nn.unbox(jax.jit(config.build().init)(jax.random.key(0), x, context)['params'])


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, x, cache=None, place=0):
  """Runs a layer on tokens from position `place` on; returns its output and the cache."""
  ones = jnp.ones(x.shape[:2], jnp.int32)
  positions = place + jnp.cumsum(ones, axis=1) - 1
  context = Context(tokens=ones, positions=positions, segments=ones)
  found, _ = config.build().apply({'params': params}, x, context, cache, mutable=['losses'])
  return found


@pytest.mark.parametrize('name', KINDS)
def test_rounded_in_every_kind(name):
  """The output changes a little; token by token it is the same; its gradient is finite."""
  x = jnp.asarray(numbers(1, 21, 16))
  config, params = KINDS[name](SMALL), start(KINDS[name](None), x)
  (plain, _), (rounded, _) = run(KINDS[name](None), params, x), run(config, params, x)
  change = np.max(np.abs(rounded - plain)) / np.max(np.abs(plain))
  assert 1e-4 < change < 0.5
  cache, rows = config.empty_cache(1, 24, jnp.float32), []
  for place in range(21):
    y, cache = run(config, params, x[:, place : place + 1], cache, place)
    rows.append(y)
  np.testing.assert_allclose(jnp.concatenate(rows, axis=1), rounded, rtol=1e-4, atol=1e-5)
  slopes = jax.jit(jax.grad(lambda params: jnp.sum(run(config, params, x)[0] ** 2)))(params)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slopes))


def test_what_is_rounded():
  """Latents whole; of V4's keys and entries the channels that are not rotated."""
  x = jnp.asarray(numbers(1, 12, 16))

  def caches(name):
    params = start(KINDS[name](None), x)
    for stored in (None, SMALL):
      config = KINDS[name](stored)
      yield run(config, params, x, config.empty_cache(1, 12, jnp.float32))[1]

  plain, rounded = caches('mla')
  np.testing.assert_allclose(rounded.latent, SMALL.round_key(plain.latent), rtol=1e-6)
  np.testing.assert_array_equal(rounded.rope_key, plain.rope_key)
  plain, rounded = caches('csa')
  rest = SHARED['head_dim'] - SHARED['rope_dim']
  for before, after in (
    (plain.recent, rounded.recent),
    (plain.past.entries, rounded.past.entries),
  ):
    np.testing.assert_allclose(after[..., :rest], SMALL.round_key(before[..., :rest]), rtol=1e-6)
    np.testing.assert_array_equal(after[..., rest:], before[..., rest:])
  want = SMALL.round_index(plain.index.entries)
  np.testing.assert_allclose(rounded.index.entries, want, rtol=1e-6)


def test_wrong_fields():
  """Sizes that a format or a rotation has no place for."""
  with pytest.raises(ConfigError, match='`group` is 0'):
    Float8(group=0)
  with pytest.raises(ConfigError, match='stored: key: Float4 needs a multiple of 32 channels'):
    MLA(**LATENT, stored=Stored(key=Float4()))
  with pytest.raises(ConfigError, match='stored: rotation: a Hadamard rotation needs a power of'):
    DSA(**LATENT, indexer=Indexer(dim=6), stored=Stored())
  with pytest.raises(ConfigError) as caught:
    CSA(**{**SHARED, 'head_dim': 24}, **{**INDEX, 'index_dim': 20}, stored=V4)
  assert len(caught.value.messages) == 2
  assert V4.check(448, 128) == Stored().check(512, 128) == []
