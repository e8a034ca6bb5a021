"""However layers are grouped, the model is the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.window import Window
from deepseek_jax.models import decoder as decoder_module
from deepseek_jax.models.decoder import canonical, grouped, plan_segments
from deepseek_jax.models.plan import Segment
from deepseek_jax.models.remat import Save, SquareRoot
from deepseek_jax.models.stack import empty_caches

DEPTH = 5


def single_layers(family, remat=None, stages=None):
  """A plan without a scan."""
  return tuple(Segment((block,), 1) for block in family.layers())


@pytest.fixture(scope='module')
def evaluate(tiny, context, canonical_variables):
  """Returns hidden states, layer losses, observations and gradients under a plan and a remat."""
  model = tiny(depth=DEPTH, dense_layers=0)
  variables = canonical_variables(model)

  @functools.cache
  def run(remat, unrolled=False):
    with pytest.MonkeyPatch.context() as patch:
      if unrolled:
        patch.setattr(decoder_module, 'plan_segments', single_layers)
      segments = decoder_module.plan_segments(model, remat)
      decoder = model.build(remat=remat)
      buffers = grouped(variables['buffers'], segments)

      def loss(params):
        (hidden, _), reported = decoder.apply(
          {'params': params, 'buffers': buffers}, context, mutable=['losses', 'observed']
        )
        balance = sum(jnp.sum(x) for x in jax.tree.leaves(reported['losses']))
        total = jnp.sum(jnp.sin(hidden) * context.real[..., None]) + balance
        return total, (hidden, balance, reported['observed'])

      grad, (hidden, balance, observed) = jax.jit(jax.grad(loss, has_aux=True))(
        grouped(variables['params'], segments)
      )
    return (
      hidden,
      balance,
      canonical(observed, segments),
      canonical(jax.device_get(grad), segments),
    )

  return run


def assert_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, b), a in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got)):
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)


def test_plans_differ(tiny):
  model = tiny(depth=DEPTH, dense_layers=0)
  assert [(len(p.pattern), p.repeats) for p in plan_segments(model)] == [(1, 5)]
  regrouped = plan_segments(model, SquareRoot())
  assert [(len(p.pattern), p.repeats) for p in regrouped] == [(2, 2), (1, 1)]
  assert len(single_layers(model)) == DEPTH


def test_scan_equals_single_layers(evaluate):
  got, want = evaluate(None), evaluate(None, unrolled=True)
  assert_equal(got, want)
  hidden, balance, observed, grad = want
  assert float(balance) > 0
  assert np.max(np.abs(hidden)) > 0.1
  # Every weight that the hidden states depend on is compared, and is not zero.
  layers = grad['layers']
  assert list(layers) == [str(i) for i in range(DEPTH)]
  for path, leaf in jax.tree_util.tree_leaves_with_path(layers):
    assert np.max(np.abs(leaf)) > 1e-6, jax.tree_util.keystr(path)
  # 16 real tokens, two experts each, in every layer.
  loads = [layer['feed_forward']['router']['load'] for layer in observed['layers'].values()]
  assert [float(np.sum(load)) for load in loads] == [32.0] * DEPTH
  assert len({tuple(np.asarray(load).tolist()) for load in loads}) > 1


def test_save_names_what_blocks_mark():
  with pytest.raises(ConfigError, match='atention'):
    Save(names=('atention',))


def test_empty_caches_follow_the_plan(tiny):
  model = tiny(depth=4, attention=Window(heads=2, latent=5, rope_dim=2, size=3, sinks=1))
  segments = plan_segments(model)
  caches = jax.eval_shape(lambda: empty_caches(segments, 2, 50, jnp.bfloat16))
  shapes = [cache[0].attention.latent.shape for cache in caches]
  assert shapes == [(2, 4, 5), (3, 2, 4, 5)]
  assert caches[0][0].attention.latent.dtype == jnp.bfloat16
