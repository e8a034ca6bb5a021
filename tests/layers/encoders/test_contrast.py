"""Losses over the pairs of eight devices are those of one, with learned scales."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.encoders.contrast import HardNegatives, InfoNCE, SigLIP
from deepseek_jax.ops.contrast import Pairs, unit
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from deepseek_jax.sharding.rules import Rules

RULES = Rules(batch=('replica', 'data', 'expert'))
KINDS = [InfoNCE(), InfoNCE(negatives=HardNegatives(hardness=2.0)), SigLIP()]


def halves(count=16):
  rng = np.random.default_rng(0)
  left, right = (jnp.asarray(rng.normal(size=(count, 6)), jnp.float32) for _ in range(2))
  return left, right, jnp.asarray(np.arange(count) % 5 != 3)


@pytest.mark.parametrize('config', KINDS)
def test_negatives_of_all_devices(config):
  """Forward, and the gradients of both halves and of the learned numbers."""
  module, (left, right, real) = config.build(), halves()
  pairs = Pairs(unit(left), unit(right), real)
  params = nn.meta.unbox(module.init(jax.random.key(0), pairs, Rules()))['params']

  def total(params, left, right):
    losses = module.apply({'params': params}, Pairs(unit(left), unit(right), real), RULES)
    return jnp.sum(losses * (1 + jnp.arange(16))), losses

  run = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
  (_, want), wanted = run(params, left, right)
  with jax.set_mesh(make_mesh(MeshConfig(replica=2, data=2, expert=2))):
    (_, found), gradients = jax.jit(run)(params, left, right)
    text = jax.jit(run).lower(params, left, right).as_text()
  assert 'all_gather' in text
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
  assert (np.asarray(want)[3::5] == 0).all()
  for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
    assert np.abs(b).max() > 0
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_what_is_learned_at_first():
  left, right, real = halves()
  pairs = Pairs(unit(left), unit(right), real)
  for config, names in ((InfoNCE(), ['log_scale']), (SigLIP(), ['log_scale', 'offset'])):
    params = nn.meta.unbox(config.build().init(jax.random.key(0), pairs, Rules()))['params']
    assert sorted(params) == names
    assert float(jnp.exp(-params['log_scale'][0])) == pytest.approx(config.temperature)


@pytest.mark.parametrize(
  ('build', 'fault'),
  [
    (lambda: InfoNCE(temperature=0.0), 'temperature'),
    (lambda: SigLIP(temperature=-1.0), 'temperature'),
    (lambda: HardNegatives(hardness=0.0), 'hardness'),
  ],
)
def test_faults(build, fault):
  with pytest.raises(ConfigError, match=fault):
    build()
