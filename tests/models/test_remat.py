"""Every rematerialisation gives the plain gradients, or nearly so, and saves memory."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.context import text_context
from deepseek_jax.layers.moe.router.noise import Gumbel
from deepseek_jax.layers.moe.router.sigmoid import Sigmoid
from deepseek_jax.models.decoder import canonical, grouped, plan_segments
from deepseek_jax.models.remat import Compressed, EveryLayer, Save, SquareRoot

DEPTH = 6
KINDS = (EveryLayer(), SquareRoot(), Save(), Compressed(block=4))
ROUNDED = 0.03
"""Bound on the error of gradients recomputed from 8 bits, relative to their norm."""


@pytest.fixture(scope='module')
def model(tiny):
  """A dense layer by itself, then a scan of five with experts."""
  return tiny(depth=DEPTH)


@pytest.fixture(scope='module')
def run(model, context, canonical_variables):
  """Returns loss, hidden states, reports and gradients under a rematerialisation."""
  variables = canonical_variables(model)

  @functools.cache
  def run(remat, dtype='float32'):
    loss, params = loss_of(model, variables, context, remat, dtype)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params).compile()
    (value, (hidden, reported)), grad = step(params)
    segments = plan_segments(model, remat)
    observed = canonical(reported['observed'], segments)
    return value, hidden, observed, canonical(jax.device_get(grad), segments)

  return run


def loss_of(model, variables, context, remat, dtype='float32'):
  """Returns a loss that depends on every layer's output and report, and its parameters."""
  segments = plan_segments(model, remat)
  decoder = model.build(jnp.dtype(dtype), remat)
  buffers = grouped(variables['buffers'], segments)

  def loss(params):
    (hidden, _), reported = decoder.apply(
      {'params': params, 'buffers': buffers}, context, mutable=['losses', 'observed']
    )
    balance = sum(jnp.sum(x) for x in jax.tree.leaves(reported['losses']))
    total = jnp.sum(jnp.sin(hidden.astype(jnp.float32)) * context.real[..., None])
    return total + balance, (hidden, reported)

  return loss, grouped(variables['params'], segments)


def error(got, want):
  """Norm of the difference of two trees over the norm of the second."""
  difference = jax.tree.map(lambda a, b: np.sum((np.float64(a) - b) ** 2), got, want)
  size = jax.tree.map(lambda b: np.sum(np.float64(b) ** 2), want)
  return np.sqrt(sum(jax.tree.leaves(difference)) / sum(jax.tree.leaves(size)))


@pytest.mark.parametrize('remat', KINDS)
def test_the_forward_pass_is_exact(run, remat):
  (value, hidden, observed, _), (plain, plain_hidden, plain_observed, _) = run(remat), run(None)
  np.testing.assert_allclose(value, plain, rtol=1e-6)
  np.testing.assert_allclose(hidden, plain_hidden, rtol=1e-5, atol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, observed, plain_observed)
  assert len(jax.tree.leaves(observed)) >= DEPTH - 1


@pytest.mark.parametrize('remat', KINDS)
def test_gradients(run, remat):
  """Exact kinds to rounding; `Compressed` within its bound, and visibly not exact."""
  got, want = run(remat)[3], run(None)[3]
  assert jax.tree.structure(got) == jax.tree.structure(want)
  off = error(got, want)
  if isinstance(remat, Compressed):
    assert 1e-4 < off < ROUNDED
  else:
    assert off < 1e-5
  for layer in range(DEPTH):
    each = error(got['layers'][str(layer)], want['layers'][str(layer)])
    assert each < (3 * ROUNDED if isinstance(remat, Compressed) else 1e-4), layer


def test_more_scales_are_more_precise(run):
  """One scale for the 8 channels of a token is worse than one a channel, which is exact."""
  plain = run(None)[3]
  errors = [error(run(Compressed(block=block))[3], plain) for block in (8, 4, 1)]
  assert errors[0] > errors[1] > errors[2]
  assert errors[2] < 1e-5


@pytest.mark.slow
def test_bfloat16(run):
  """Rounding to 8 bits is beside the rounding of bfloat16 itself."""
  got, want, exact = run(Compressed(), 'bfloat16'), run(None, 'bfloat16'), run(None)
  assert got[1].dtype == jnp.bfloat16
  assert error(got[3], want[3]) < error(want[3], exact[3]) + 3 * ROUNDED


def remembered(loss, params):
  """Shapes of what the forward pass keeps for the backward pass, beside parameters."""
  pull = jax.eval_shape(lambda p: jax.vjp(lambda q: loss(q)[0], p)[1], params)
  known = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)}
  leaves = [leaf for leaf in jax.tree.leaves(pull) if hasattr(leaf, 'dtype')]
  return [leaf for leaf in leaves if (leaf.shape, leaf.dtype) not in known]


def test_what_is_remembered(tiny, canonical_variables):
  """`Compressed` keeps the stream of the scan in int8, and no float array of that size."""
  model = tiny(depth=DEPTH, dense_layers=0)
  variables = canonical_variables(model)
  tokens = text_context(jnp.zeros((3, 17), jnp.int32))
  stream = (DEPTH, 3, 17, model.width)
  kept = {}
  for remat in (None, EveryLayer(), Save(), Compressed(block=8)):
    kept[remat] = remembered(*loss_of(model, variables, tokens, remat))
  streams = {
    remat: [leaf.dtype for leaf in leaves if leaf.shape == stream] for remat, leaves in kept.items()
  }
  assert streams[Compressed(block=8)] == [jnp.int8]
  assert streams[EveryLayer()] == [jnp.float32]
  assert streams[Save()] == [jnp.float32] * 2
  size = {
    remat: sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) for remat, leaves in kept.items()
  }
  elements = np.prod(stream)
  # 4 bytes an element against 1 and a scale for 8.
  saved = size[EveryLayer()] - size[Compressed(block=8)]
  assert saved == pytest.approx((4 - 1.5) * elements, rel=0.05)
  assert size[Compressed(block=8)] < size[EveryLayer()] < size[Save()] < size[None]


class Lanes(nn.Module):
  """A layer of a stream with lanes, [B, T, R, D], that reports, has a buffer and a cache."""

  size: int

  @nn.compact
  def __call__(self, stream, context, caches=None):
    init = nn.initializers.normal(0.3)
    matrix = self.param('matrix', init, (self.size, self.size))
    bias = self.variable('buffers', 'bias', lambda: jnp.zeros(self.size)).value
    if self.is_mutable_collection('losses') and not self.is_initializing():
      self.put_variable('losses', 'mean', jnp.mean(jnp.square(stream['lanes'] @ matrix)))
    lanes = stream['lanes'] + jnp.tanh(stream['lanes'] @ matrix + bias)
    if caches is not None:
      lanes, caches = lanes + caches, caches + 1
    return {'lanes': lanes, 'total': stream['total'] + lanes.sum(2)}, caches


@pytest.mark.parametrize('repeats', [1, 4])
def test_streams_of_any_shape(repeats):
  """Trees and lanes pass; so do caches, buffers and reports, scanned or not."""

  def outcome(remat):
    module = Lanes if remat is None else remat.wrap(Lanes, scanned=repeats > 1)
    if repeats > 1:
      module = nn.scan(
        module,
        variable_axes={'params': 0, 'buffers': 0, 'losses': 0},
        split_rngs={'params': True},
        in_axes=(nn.broadcast, 0),
        length=repeats,
      )
    layer = module(5)
    keys = jax.random.split(jax.random.key(0), 3)
    lanes = jax.random.normal(keys[0], (2, 3, 2, 5))
    stream = {'lanes': lanes, 'total': jnp.zeros((2, 3, 5))}
    caches = jax.random.normal(keys[1], (*((repeats,) if repeats > 1 else ()), 2, 3, 2, 5))
    variables = layer.init(keys[2], stream, None, caches)

    def loss(params, stream, caches):
      (stream, caches), reported = layer.apply(
        {**variables, 'params': params}, stream, None, caches, mutable=['losses']
      )
      total = jnp.sum(jnp.sin(stream['total'])) + jnp.sum(jnp.cos(stream['lanes']))
      return total + jnp.sum(reported['losses']['mean']) + jnp.sum(jnp.sin(caches))

    arguments = (variables['params'], stream, caches)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arguments)

  (plain, want), (value, got) = outcome(None), outcome(Compressed(block=2))
  assert float(value) == pytest.approx(float(plain), rel=1e-6)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  assert 1e-5 < error(got, want) < ROUNDED


def test_a_block_has_channels():
  with pytest.raises(ConfigError, match='`block` is 0; expected 1 or more'):
    Compressed(block=0)


def test_noise_reaches_the_routers(tiny, context, canonical_variables):
  """Keys differ, so choices do; EveryLayer hands the keys on by itself, here we do."""
  model, remat = tiny(), Compressed(block=4)
  router = Sigmoid(noise=Gumbel(scale=3.0))
  model = dataclasses.replace(
    model, feed_forward=dataclasses.replace(model.feed_forward, router=router)
  )
  segments = plan_segments(model, remat)
  decoder = model.build(jnp.float32, remat)
  variables = {k: grouped(v, segments) for k, v in canonical_variables(model).items()}

  def loss(params, key):
    given = {**variables, 'params': params}
    rngs = {'noise': key}
    (hidden, _), reported = decoder.apply(given, context, mutable=['observed'], rngs=rngs)
    return jnp.sum(jnp.sin(hidden)), reported['observed']

  params, keys = variables['params'], [jax.random.key(seed) for seed in (0, 0, 1)]
  step = jax.jit(jax.grad(loss, has_aux=True)).lower(params, keys[0]).compile()
  first, again, other = (step(params, key) for key in keys)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  for mine, theirs in zip(jax.tree.leaves(first[1]), jax.tree.leaves(other[1])):
    assert np.any(mine != theirs)
