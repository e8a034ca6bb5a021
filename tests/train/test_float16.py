"""Gradients in float16 under a loss scale are those of float32; without one they are lost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.core.tree import flatten
from deepseek_jax.data.batch import Batch
from deepseek_jax.layers.moe.balance import SequenceBalance
from deepseek_jax.models.decoder import init_variables
from deepseek_jax.ops.losses import chunked_cross_entropy
from deepseek_jax.sharding.rules import Rules
from deepseek_jax.train import objective

ROWS, LENGTH, DIVISOR = 4, 16, 2.0**22


def batch() -> Batch:
  """Four rows of one document each."""
  generator = np.random.default_rng(0)
  tokens, targets = (generator.integers(3, 259, (ROWS, LENGTH)).astype(np.int32) for _ in range(2))
  ones = np.ones((ROWS, LENGTH), np.int32)
  places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ones.shape)
  return Batch(tokens, targets, ones.astype(np.float32), places, ones, ones - 1)


@functools.cache
def gradients(dtype: str, scale: float | None) -> tuple[dict, dict[str, np.ndarray]]:
  """Scalars, and gradients with the scale divided out, of a batch as if it were one of 2²² rows.

  Every expert is chosen, so that no near-tie between experts falls another way in float16; the
  balance loss, MTP, the experts' own gradients and the vocabulary loss all take part.
  """
  base = tiny_mla.get_config().model
  sparse = dataclasses.replace(
    base.feed_forward, experts=4, top_k=4, balance=SequenceBalance(weight=0.1)
  )
  model = dataclasses.replace(base, depth=2, feed_forward=sparse)
  decoder = model.build(dtype=jnp.dtype(dtype))
  shapes = jax.eval_shape(lambda key: init_variables(decoder, key), jax.random.key(0))
  generator = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda leaf: generator.normal(0, 0.2, leaf.shape).astype(np.float32),
    jax.tree.map(lambda box: box.value, shapes, is_leaf=lambda leaf: hasattr(leaf, 'names')),
  )
  rows = jax.tree.map(jnp.asarray, batch())
  totals = objective.Totals(jnp.full(2, DIVISOR * LENGTH), DIVISOR)
  factor = None if scale is None else jnp.float32(scale)

  def loss(params):
    context = objective.batch_context(rows, Rules())
    whole = {'params': params, 'buffers': variables['buffers']}
    return objective.training_loss(
      decoder, whole, rows, totals, jnp.float32(0.3), context, 8, factor
    )

  run = jax.jit(jax.grad(loss, has_aux=True)).lower(variables['params']).compile()
  grads, (scalars, _) = run(variables['params'])
  return jax.device_get(scalars), {
    address: np.asarray(leaf) / (scale or 1) for address, leaf in flatten(grads).items()
  }


def errors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> np.ndarray:
  """Relative error of every array."""
  return np.array(
    [
      np.linalg.norm(found[address] - array) / np.linalg.norm(array)
      for address, array in expected.items()
    ]
  )


@pytest.mark.slow
def test_scaled_gradients_are_those_of_float32():
  """Every weight's gradient, to float16's 11 bits; and the reported losses are not scaled."""
  scalars, expected = gradients('float32', None)
  scaled_scalars, found = gradients('float16', DIVISOR)
  assert len(expected) > 30
  assert all(np.any(array) for array in expected.values())
  worst = errors(found, expected)
  assert worst.max() < 0.03
  assert np.median(worst) < 0.005
  for name, value in scalars.items():
    assert float(scaled_scalars[name]) == pytest.approx(float(value), rel=2e-3), name


@pytest.mark.slow
def test_without_a_scale_small_gradients_are_lost():
  """The same gradients, about 2⁻²² of those of a small batch, round to nothing."""
  expected, found = gradients('float32', None)[1], gradients('float16', None)[1]
  worst = errors(found, expected)
  assert np.median(worst) > 0.1
  lost = [np.mean((found[a] == 0) & (expected[a] != 0)) for a in expected]
  kept = gradients('float16', DIVISOR)[1]
  assert np.mean(lost) > 0.3
  assert np.mean([np.mean((kept[a] == 0) & (expected[a] != 0)) for a in expected]) < 0.02


def test_in_float32_a_scale_changes_nothing():
  """A power of two goes in and comes out again, through every op with a gradient of its own."""
  expected, found = gradients('float32', None)[1], gradients('float32', 2.0**10)[1]
  assert errors(found, expected).max() < 1e-5


def test_the_vocabulary_loss_needs_its_scale_from_inside():
  """Its gradient is rounded in the forward pass: a factor from outside comes too late.

  Entries of improbable tokens are about 1e-9: lost to float16, were it not for the scale.
  """
  hidden = jnp.ones((1, 4, 2))
  head = jnp.concatenate([jnp.full((2, 1), 10.0), jnp.zeros((2, 5))], axis=1)
  targets, weights = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4))
  scale = 2.0**14

  def gradient(dtype, inside, outside):
    def loss(hidden, head):
      return outside * chunked_cross_entropy(hidden, head, targets, inside * weights, 4)

    found = jax.grad(loss, argnums=1)(hidden.astype(dtype), head.astype(dtype))
    return np.asarray(found, np.float64)[:, 1:] / (inside * outside)

  expected = gradient(jnp.float32, 1.0, 1.0)
  assert 0 < expected.min() <= expected.max() < 2e-8
  np.testing.assert_array_equal(gradient(jnp.float16, 1.0, scale), 0)
  np.testing.assert_allclose(gradient(jnp.float16, scale, 1.0), expected, rtol=0.02)
