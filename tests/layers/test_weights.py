"""How layers declare weights and state, and report beside their output."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.layers.weights import (
  Labelled,
  add_loss,
  buffer,
  observe,
  scale,
  table,
  weight,
)


class Sample(nn.Module):
  """One of everything."""

  @nn.compact
  def __call__(self, x):
    """Returns x [N] in its dtype."""
    w = weight(self, 'w', (4, 50, 40, 30), ('expert', 'embed', None, 'mlp'), dtype=x.dtype)
    pair = weight(self, 'pair', (30, 40, 50), ('heads', None, 'embed'), dtype=x.dtype, inputs=2)
    plain = weight(self, 'plain', (400, 50), ('embed', 'mlp'), dtype=x.dtype)
    s = scale(self, 's', 3)
    t = table(self, 't', (300, 40), ('vocab', 'embed'), std=0.02)
    b = buffer(self, 'b', (2,), (None,))
    observe(self, 'count', jnp.sum(x))
    add_loss(self, 'loss', 2 * jnp.sum(x))
    return x + sum(jnp.sum(a).astype(x.dtype) for a in (w, pair, plain, s, t, b))


@pytest.fixture(scope='module')
def variables():
  return jax.jit(Sample().init)(jax.random.key(0), jnp.ones(2, jnp.bfloat16))


def test_standard_deviations(variables):
  params = nn.meta.unbox(variables)['params']
  fan_in = {'w': 50, 'pair': 30 * 40, 'plain': 400}
  for name, size in fan_in.items():
    assert np.std(params[name]) == pytest.approx(size**-0.5, rel=0.03), name
  assert np.std(params['t']) == pytest.approx(0.02, rel=0.03)
  np.testing.assert_array_equal(params['s'], 1)


def test_master_copies_are_float32_and_labelled(variables):
  assert set(variables) == {'params', 'buffers'}
  boxes = jax.tree.leaves(variables, is_leaf=lambda leaf: isinstance(leaf, Labelled))
  assert len(boxes) == 6
  for box in boxes:
    assert isinstance(box, Labelled)
    assert box.value.dtype == jnp.float32
    assert len(box.names) == box.value.ndim
  assert variables['params']['w'].names == ('expert', 'embed', None, 'mlp')
  np.testing.assert_array_equal(variables['buffers']['b'].value, np.zeros(2))


def test_a_scan_labels_its_axis_and_starts_each_step_differently():
  class Step(nn.Module):
    """A scan step with one weight."""

    @nn.compact
    def __call__(self, x, _):
      """Returns the carry x [4] and nothing."""
      return x @ weight(self, 'w', (4, 4), ('embed', 'mlp'), dtype=x.dtype), None

  scan = nn.scan(
    Step,
    variable_axes={'params': 0},
    split_rngs={'params': True},
    length=3,
    metadata_params={nn.PARTITION_NAME: 'layers'},
  )
  box = jax.jit(scan().init)(jax.random.key(0), jnp.ones(4), None)['params']['w']
  assert box.names == ('layers', 'embed', 'mlp')
  assert box.value.shape == (3, 4, 4)
  assert np.max(np.abs(box.value[0] - box.value[1])) > 0.1


def test_reports_reach_the_collections_that_are_asked_for(variables):
  x = jnp.arange(2.0)
  plain = nn.meta.unbox(variables)
  y, reported = Sample().apply(plain, x, mutable=['losses', 'observed'])
  assert y.dtype == jnp.float32
  assert float(reported['observed']['count']) == 1.0
  assert float(reported['losses']['loss']) == 2.0
  _, reported = Sample().apply(plain, x, mutable=['losses'])
  assert set(reported) == {'losses'}
  # Nothing is asked for: nothing is stored, and the output is alone.
  np.testing.assert_array_equal(Sample().apply(plain, x), y)


def test_losses_have_a_gradient_and_observations_none(variables):
  plain = nn.meta.unbox(variables)

  def read(collection, name):
    run = lambda x: Sample().apply(plain, x, mutable=[collection])[1][collection][name]  # noqa: E731
    return jax.jit(jax.grad(run))(jnp.arange(2.0))

  np.testing.assert_array_equal(read('losses', 'loss'), 2)
  np.testing.assert_array_equal(read('observed', 'count'), 0)
