"""Muon against a plain Newton–Schulz iteration in NumPy, matrix by matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.optim.optimizer import AdamW, Muon
from deepseek_jax.optim.schedule import Constant

AXES = {
  'experts': ('layers', 'expert', 'expert_embed', 'expert_mlp'),
  'query': ('layers', 'embed', 'heads', None),
  'output': ('heads', None, 'embed'),
  'table': ('vocab', 'embed'),
  'norm': ('embed',),
}
SHAPES = {
  'experts': (2, 3, 5, 7),
  'query': (2, 5, 3, 4),
  'output': (3, 4, 5),
  'table': (11, 5),
  'norm': (5,),
}
TO_MATRICES = {
  'experts': lambda x: x.reshape(6, 5, 7),
  'query': lambda x: x.reshape(2, 5, 12),
  'output': lambda x: x.reshape(1, 12, 5),
}


def random_tree(seed):
  rng = np.random.default_rng(seed)
  return {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}


def newton_schulz(matrix, fast_steps, settling_steps):
  x = matrix.astype(np.float64)
  x = x / (np.linalg.norm(x) + 1e-8)
  for i in range(fast_steps + settling_steps):
    a, b, c = (3.4445, -4.7750, 2.0315) if i < fast_steps else (2.0, -1.5, 0.5)
    gram = x @ x.T
    x = a * x + b * gram @ x + c * gram @ gram @ x
  return x


def updates_of(optimizer, params, gradients):
  transform = optimizer.build(Constant().build(5), AXES)
  params = jax.tree.map(jnp.asarray, params)
  state = transform.init(params)
  update = jax.jit(transform.update)
  for gradient in gradients:
    updates, state = update(gradient, state, params)
  return jax.tree.map(np.asarray, updates), state


@pytest.mark.parametrize(('fast_steps', 'settling_steps'), [(5, 0), (8, 2)])
def test_each_matrix_equals_newton_schulz(fast_steps, settling_steps):
  optimizer = Muon(
    peak_lr=0.5,
    fast_steps=fast_steps,
    settling_steps=settling_steps,
    weight_decay=0.3,
    clip_norm=None,
  )
  params, gradients = random_tree(0), [random_tree(1), random_tree(2)]
  updates, _ = updates_of(optimizer, params, gradients)
  for name, to_matrices in TO_MATRICES.items():
    g1, g2, w = (to_matrices(tree[name]) for tree in (*gradients, params))
    mean = 0.95 * 0.05 * g1.astype(np.float64) + 0.05 * g2
    # Bias-corrected Nesterov momentum of the second update.
    nesterov = 0.95 * mean / (1 - 0.95**3) + 0.05 * g2 / (1 - 0.95**2)
    scale = 0.2 * np.sqrt(max(w.shape[1:]))
    expected = [
      -0.5 * (scale * newton_schulz(m, fast_steps, settling_steps) + 0.3 * p)
      for m, p in zip(nesterov, w)
    ]
    np.testing.assert_allclose(to_matrices(updates[name]), expected, atol=2e-5)


def test_settled_updates_are_orthogonal_with_the_promised_size():
  optimizer = Muon(peak_lr=1.0, fast_steps=8, settling_steps=2, weight_decay=0.0)
  updates, _ = updates_of(optimizer, random_tree(0), [random_tree(1)])
  for name, to_matrices in TO_MATRICES.items():
    for matrix in to_matrices(updates[name]):
      values = np.linalg.svd(matrix, compute_uv=False)
      np.testing.assert_allclose(values, 0.2 * np.sqrt(max(matrix.shape)), rtol=1e-2)
      np.testing.assert_allclose(np.sqrt((matrix**2).mean()), 0.2, rtol=1e-2)


def test_heads_are_one_side_not_many_matrices():
  optimizer = Muon(peak_lr=1.0, weight_decay=0.0)
  gradient = random_tree(1)
  updates, _ = updates_of(optimizer, random_tree(0), [gradient])
  flat_axes = {'query': ('layers', 'embed', 'mlp'), 'output': ('mlp', 'embed')}
  flat = {'query': gradient['query'].reshape(2, 5, 12), 'output': gradient['output'].reshape(12, 5)}
  transform = optimizer.build(Constant().build(5), flat_axes)
  expected, _ = transform.update(flat, transform.init(flat), flat)
  for name in flat:
    np.testing.assert_allclose(
      updates[name].reshape(flat[name].shape), expected[name], rtol=1e-4, atol=1e-6
    )


def test_the_rest_is_adamw_at_its_own_rate():
  gradients = [random_tree(1), random_tree(2)]
  muon, _ = updates_of(Muon(peak_lr=0.1, adam_ratio=0.25), random_tree(0), gradients)
  adam, _ = updates_of(AdamW(peak_lr=0.025), random_tree(0), gradients)
  for name in ('table', 'norm'):
    np.testing.assert_allclose(muon[name], adam[name], rtol=1e-5, atol=1e-8)
  assert np.abs(muon['output'] - adam['output']).max() > 1e-3


def test_moments_are_stored_in_bfloat16_and_the_state_keeps_its_types():
  optimizer = Muon(peak_lr=0.1, moments='bfloat16')
  _, state = updates_of(optimizer, random_tree(0), [random_tree(1)])
  arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.shape in SHAPES.values()]
  assert len(arrays) == 3 + 2 * 2, 'one moment a matrix, two for the rest'
  assert {leaf.dtype for leaf in arrays} == {jnp.dtype('bfloat16')}
  before = jax.eval_shape(optimizer.build(Constant().build(5), AXES).init, random_tree(0))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )


def test_an_expert_without_gradient_stays():
  gradient = random_tree(1)
  gradient['experts'][1, 2] = 0
  updates, _ = updates_of(Muon(peak_lr=1.0, weight_decay=0.0), random_tree(0), [gradient])
  np.testing.assert_array_equal(updates['experts'][1, 2], 0)
  assert np.abs(updates['experts'][1, 1]).max() > 0.1


def test_sharded_experts_are_not_gathered():
  if jax.device_count() < 4:
    pytest.skip('needs four devices; the test run as a whole provides eight')
  mesh = jax.make_mesh((4,), ('expert',), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'expert'))
  axes = {'up': ('layers', 'expert', 'expert_embed', 'expert_mlp')}
  weight = {'up': jax.ShapeDtypeStruct((3, 8, 5, 7), jnp.float32, sharding=split)}
  transform = Muon(peak_lr=1.0).build(Constant().build(1), axes)

  def update(gradient, params):
    return transform.update(gradient, transform.init(params), params)[0]

  text = jax.jit(update, out_shardings=split).lower(weight, weight).compile().as_text()
  assert 'all-reduce' in text, 'the norm of all gradients'
  assert 'all-gather' not in text


def test_an_axis_between_the_sides_may_count_matrices():
  gradient = random_tree(1)['experts']
  axes = {'a': ('expert_embed', 'expert', 'layers', 'expert_mlp')}
  params = {'a': jnp.asarray(gradient.transpose(2, 1, 0, 3))}
  transform = Muon(peak_lr=1.0, weight_decay=0.0).build(Constant().build(1), axes)
  updates, state = transform.update(params, transform.init(params), params)
  plain, _ = updates_of(Muon(peak_lr=1.0, weight_decay=0.0), random_tree(0), [random_tree(1)])
  found = updates['a'].transpose(2, 1, 0, 3)
  np.testing.assert_allclose(found, plain['experts'], rtol=1e-4, atol=1e-5)
  assert (5, 3, 2, 7) in [leaf.shape for leaf in jax.tree.leaves(state)]


def test_unclassifiable_weight_is_an_error():
  with pytest.raises(ValueError, match="'a/kernel'"):
    Muon(peak_lr=1.0).build(Constant().build(1), {'a': {'kernel': ('embed', 'mlp', 'latent')}})


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('peak_lr', -1.0),
    ('momentum', 1.0),
    ('fast_steps', 0),
    ('settling_steps', -1),
    ('consistent_rms', 0.0),
    ('adam_ratio', 0.0),
    ('moments', 'int8'),
  ],
)
def test_wrong_fields_are_errors(field, value):
  with pytest.raises(ConfigError, match=f'Muon.{field}: found {value!r}'):
    Muon(**{'peak_lr': 1.0, field: value})


def test_descends_a_quadratic():
  transform = Muon(peak_lr=0.2, weight_decay=0.0).build(Constant().build(60), AXES)
  target = jax.tree.map(jnp.asarray, random_tree(3))
  params = jax.tree.map(jnp.zeros_like, target)
  state = transform.init(params)

  def loss(params):
    return sum(((a - b) ** 2).sum() for a, b in zip(*map(jax.tree.leaves, (params, target))))

  @jax.jit
  def step(params, state):
    updates, state = transform.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  start = loss(params)
  for _ in range(60):
    params, state = step(params, state)
  assert loss(params) < 0.1 * start
