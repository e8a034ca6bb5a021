"""AdamW against an update written out in NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import Constant, Cosine

AXES = {'matrix': ('embed', 'mlp'), 'norm': ('embed',)}
SHAPES = {'matrix': (5, 7), 'norm': (5,)}


def random_tree(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return {k: (scale * rng.normal(size=s)).astype(np.float32) for k, s in SHAPES.items()}


def run(optimizer, schedule_fn, params, gradients):
  transform = optimizer.build(schedule_fn, AXES)
  params = jax.tree.map(jnp.asarray, params)
  state = transform.init(params)

  @jax.jit
  def step(params, state, gradient):
    updates, state = transform.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  for gradient in gradients:
    params, state = step(params, state, gradient)
  return params, state


def oracle(optimizer, rates, params, gradients, rounded):
  """AdamW in float64 but for the storage of the moments."""
  params = {k: v.astype(np.float64) for k, v in params.items()}
  mean = {k: np.zeros_like(v) for k, v in params.items()}
  square = {k: np.zeros_like(v) for k, v in params.items()}
  for t, gradient in enumerate(gradients, start=1):
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradient.values()))
    factor = 1.0 if optimizer.clip_norm is None else min(1.0, optimizer.clip_norm / norm)
    for k in params:
      g = gradient[k].astype(np.float64) * factor
      m = optimizer.beta1 * mean[k] + (1 - optimizer.beta1) * g
      v = optimizer.beta2 * square[k] + (1 - optimizer.beta2) * g**2
      direction = (m / (1 - optimizer.beta1**t)) / (
        np.sqrt(v / (1 - optimizer.beta2**t)) + optimizer.epsilon
      )
      if k == 'matrix':
        direction = direction + optimizer.weight_decay * params[k]
      params[k] = params[k] - rates[t - 1] * direction
      mean[k], square[k] = rounded(m), rounded(v)
  return params


@pytest.mark.parametrize('clip_norm', [None, 1.0, 1e6])
@pytest.mark.parametrize('moments', ['float32', 'bfloat16'])
def test_equals_the_oracle(moments, clip_norm):
  optimizer = AdamW(peak_lr=0.03, weight_decay=0.5, clip_norm=clip_norm, moments=moments)
  gradients = [random_tree(i + 1) for i in range(6)]
  schedule_fn = Cosine(warmup_steps=2).build(6)
  params, _ = run(optimizer, schedule_fn, random_tree(0), gradients)
  storage = np.float32 if moments == 'float32' else ml_dtypes.bfloat16
  expected = oracle(
    optimizer,
    [float(optimizer.peak_lr * schedule_fn(k)) for k in range(6)],
    random_tree(0),
    gradients,
    lambda x: x.astype(storage).astype(np.float64),
  )
  # A moment at a rounding edge may fall to the other side: one bfloat16 step of one moment.
  tolerance = 2e-6 if moments == 'float32' else 5e-4
  for name in SHAPES:
    np.testing.assert_allclose(params[name], expected[name], atol=tolerance)


def test_clipping_matters_to_the_oracle():
  gradients = [random_tree(1, 10.0), random_tree(2, 0.01)]
  clipped, _ = run(AdamW(peak_lr=0.1), Constant().build(2), random_tree(0), gradients)
  free, _ = run(AdamW(peak_lr=0.1, clip_norm=None), Constant().build(2), random_tree(0), gradients)
  assert np.abs(clipped['matrix'] - free['matrix']).max() > 1e-3


@pytest.mark.parametrize('moments', ['float32', 'bfloat16'])
def test_both_moments_are_stored_in_the_format(moments):
  _, state = run(
    AdamW(peak_lr=0.1, moments=moments), Constant().build(2), random_tree(0), [random_tree(1)]
  )
  for name in ('mu', 'nu'):
    leaves = jax.tree.leaves(optax.tree.get(state, name))
    assert len(leaves) == 2
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(moments)}
  before = jax.eval_shape(AdamW(peak_lr=0.1, moments=moments).build(Constant().build(2), AXES).init,
                          random_tree(0))  # fmt: skip
  assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  ), 'the state keeps its types from step to step'


def test_bfloat16_gradients_are_widened_first():
  transform = AdamW(peak_lr=0.1).build(Constant().build(2), AXES)
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_tree(0))
  state = transform.init(params)
  updates, state = transform.update(params, state, params)
  assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype('float32')}
  assert {u.dtype for u in jax.tree.leaves(optax.tree.get(state, 'nu'))} == {jnp.dtype('float32')}


def test_only_matrices_decay():
  zeros = jax.tree.map(np.zeros_like, random_tree(0))
  start = random_tree(0)
  params, _ = run(AdamW(peak_lr=0.1, weight_decay=0.5), Constant().build(1), start, [zeros])
  np.testing.assert_allclose(params['matrix'], 0.95 * start['matrix'], rtol=1e-6)
  np.testing.assert_array_equal(params['norm'], start['norm'])


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('peak_lr', 0.0),
    ('beta1', 1.0),
    ('beta2', -0.1),
    ('epsilon', 0.0),
    ('weight_decay', -1.0),
    ('clip_norm', 0.0),
    ('moments', 'float16'),
  ],
)
def test_wrong_fields_are_errors(field, value):
  with pytest.raises(ConfigError, match=f'AdamW.{field}: found {value!r}'):
    AdamW(**{'peak_lr': 1.0, field: value})
