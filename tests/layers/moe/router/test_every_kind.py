"""What holds for every kind of router that `MoE.router` names."""

import dataclasses
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.layers.moe.interface import Limits, RouterConfig
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.balanced import Balanced
from deepseek_jax.layers.moe.router.expert_attention import ExpertAttention
from deepseek_jax.layers.moe.router.hash import Hash
from deepseek_jax.layers.moe.router.modality import ModalitySigmoid
from deepseek_jax.layers.moe.router.noise import Gaussian, Gumbel, Jitter
from deepseek_jax.layers.moe.router.sigmoid import Sigmoid
from deepseek_jax.layers.moe.router.softmax import Softmax
from deepseek_jax.layers.moe.router.sqrt_softplus import SqrtSoftplus
from deepseek_jax.layers.moe.router.table import ByFrequency
from deepseek_jax.layers.moe.z_loss import ZLoss
from deepseek_jax.optim.balance import update_buffers

E, K = 6, 3
ROUTERS = {
  'softmax': Softmax(),
  'softmax_groups': Softmax(groups=3, kept_groups=2, scale=2.0),
  'sigmoid': Sigmoid(),
  'sigmoid_groups': Sigmoid(groups=3, kept_groups=2),
  'sqrt_softplus': SqrtSoftplus(),
  'hash': Hash(vocab=11),
  'hash_by_frequency': Hash(vocab=11, table=ByFrequency(counts=tuple(range(11)))),
  'expert_attention': ExpertAttention(dim=5),
  'balanced': Balanced(),
  'modality': ModalitySigmoid(),
}
NOISY = [
  ('softmax', Gumbel()),
  ('sigmoid_groups', Gaussian(std=3.0)),
  ('sqrt_softplus', Jitter(amount=0.5)),
]


@pytest.fixture(params=ROUTERS)
def router(request):
  return ROUTERS[request.param]


def test_no_kind_is_forgotten():
  registered = set(typing.get_args(typing.get_type_hints(MoE)['router']))
  assert {type(router) for router in ROUTERS.values()} == registered
  for router in ROUTERS.values():
    assert isinstance(router, RouterConfig)
    assert router.check(E, K) == []


def check(got, context, top_k):
  """An assignment is well formed: no expert twice, nobody weighs nothing."""
  tokens = context.tokens.size
  experts, weights = np.asarray(got.experts), np.asarray(got.weights)
  assert experts.shape == weights.shape == (tokens, K)
  assert got.experts.dtype == jnp.int32
  assert got.weights.dtype == got.scores.dtype == jnp.float32
  assert got.scores.shape == (tokens, E)
  assert np.all((experts >= 0) & (experts <= E))
  for row in experts:
    chosen = row[row < E].tolist()
    assert len(set(chosen)) == len(chosen) <= top_k
  np.testing.assert_array_equal(weights[experts == E], 0)
  assert np.all(weights[experts < E] > 0)
  return experts


def test_routes_and_honours_limits(router, setup):
  variables, x, context, apply = setup(router, E, K)
  free = apply(variables, x, context)
  assert np.all(check(free, context, K) < E)

  # Limits that limit nothing change nothing.
  whole = Limits(allowed=jnp.ones(E, bool), top_k=jnp.int32(K))
  for name in ('experts', 'weights', 'scores'):
    same = getattr(apply(variables, x, context, whole), name)
    np.testing.assert_allclose(same, getattr(free, name), rtol=1e-6)

  allowed = jnp.array([False, True, True, False, True, True])
  some = apply(variables, x, context, Limits(allowed=allowed, top_k=jnp.int32(K)))
  experts = check(some, context, K)
  assert not np.isin(experts, [0, 3]).any()
  np.testing.assert_array_equal(some.scores[:, ~allowed], 0)
  # Fewer experts than choices: the rest is nobody's.
  two = apply(variables, x, context, Limits(allowed=jnp.arange(E) >= 4, top_k=jnp.int32(K)))
  assert np.all(check(two, context, K)[:, 2] == E)


@pytest.mark.parametrize('count', [1, 2])
def test_fewer_choices_are_those_of_a_router_with_fewer(router, setup, count):
  variables, x, context, apply = setup(router, E, K)
  got = apply(variables, x, context, Limits(allowed=jnp.ones(E, bool), top_k=jnp.int32(count)))
  assert np.all(check(got, context, count)[:, count:] == E)
  small = router.build(E, count)
  fewer = {
    name: {key: a[:, :count] if key == 'table' else a for key, a in tree.items()}
    for name, tree in variables.items()
  }
  want = jax.jit(small.apply)(fewer, x, context)
  np.testing.assert_array_equal(got.experts[:, :count], want.experts)
  np.testing.assert_allclose(got.weights[:, :count], want.weights, rtol=1e-6)


def test_one_token(router, setup):
  variables, x, context, apply = setup(router, E, K, shape=(1, 1, 4))
  assert np.all(check(apply(variables, x, context), context, K) < E)


def test_trains_a_step(router, packed):
  z_loss = None if isinstance(router, Balanced) else ZLoss(weight=0.1)
  config = MoE(experts=E, top_k=K, hidden=3, shared=None, router=router, z_loss=z_loss)
  module, context = config.build(), packed(2, 7)
  x = np.random.default_rng(1).standard_normal((2, 7, 4)).astype(np.float32)
  variables = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), x, context))

  @jax.jit
  def step(params, buffers, key):
    def loss(params):
      tree = {'params': params, 'buffers': buffers}
      y, reported = module.apply(
        tree, x, context, mutable=['losses', 'observed'], rngs={'noise': key}
      )
      total = jnp.sum(jnp.sin(y)) + sum(reported['losses'].values())
      return total, reported['observed']

    grads, observed = jax.grad(loss, has_aux=True)(params)
    return grads, update_buffers(buffers, observed, 0.1), observed['router']['load']

  buffers = variables.get('buffers', {})
  grads, moved, load = step(variables['params'], buffers, jax.random.key(1))
  assert float(load.sum()) == K * int(context.real.sum())
  if 'router' in variables['params']:
    for grad in jax.tree.leaves(grads['router']):
      assert np.all(np.isfinite(grad))
      assert np.any(np.asarray(grad) != 0)
  assert jax.tree.structure(moved) == jax.tree.structure(buffers)
  if 'table' in buffers.get('router', {}):
    np.testing.assert_array_equal(moved['router']['table'], buffers['router']['table'])
  if 'selection_bias' in buffers.get('router', {}):
    assert np.any(np.asarray(moved['router']['selection_bias']) != 0)


@pytest.mark.parametrize(('name', 'noise'), NOISY)
def test_noise_is_of_training_alone(name, noise, setup):
  variables, x, context, apply = setup(ROUTERS[name], E, K)
  module = dataclasses.replace(ROUTERS[name], noise=noise).build(E, K)
  run = jax.jit(lambda v, x, c, key: module.apply(v, x, c, rngs={'noise': key}))
  clean = apply(variables, x, context)
  calm = jax.jit(module.apply)(variables, x, context)
  np.testing.assert_array_equal(calm.experts, clean.experts)
  np.testing.assert_array_equal(calm.weights, clean.weights)
  first, again, other = (run(variables, x, context, jax.random.key(k)) for k in (0, 0, 1))
  np.testing.assert_array_equal(first.experts, again.experts)
  assert np.any(first.experts != other.experts)
  if isinstance(noise, Jitter):
    assert np.any(np.asarray(first.scores) != np.asarray(clean.scores))
  else:
    # The choice is disturbed, the scores are not.
    np.testing.assert_array_equal(first.scores, clean.scores)
    assert np.any(first.experts != clean.experts)
