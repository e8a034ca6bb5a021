"""The mixture-of-experts layer against float64 loops, and what it reports beside its output."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.override import override
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe.balance import (
  BatchBalance,
  CommunicationBalance,
  DeviceBalance,
  ExpertBalance,
  SequenceBalance,
  Several,
)
from deepseek_jax.layers.moe.interface import Balance, Dispatch, RouterConfig
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.sigmoid import Sigmoid
from deepseek_jax.ops.balance import batch_balance, expert_balance, sequence_balance

B, T, D = 2, 5, 6
SEGMENTS = np.array([[1, 1, 2, 0, 0], [1, 1, 1, 1, 1]], np.int32)


def context():
  ids = np.zeros((B, T), np.int32)
  return Context(tokens=ids, positions=ids, segments=SEGMENTS)


def setup(config):
  """Parameters, buffers with a bias that matters, activations, and the jitted layer."""
  module = config.build()
  x = np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32)
  variables = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), x, context()))
  assert set(variables) == {'params', 'buffers'}
  bias = 0.2 * jnp.cos(jnp.arange(config.experts, dtype=jnp.float32))
  variables['buffers']['router']['selection_bias'] = bias
  run = jax.jit(lambda v, x, c: module.apply(v, x, c, mutable=['losses', 'observed']))
  return variables, x, run


def swiglu_oracle(x, p, expert=None):
  pick = (lambda a: a) if expert is None else (lambda a: a[expert])
  gate = x @ pick(p['gate'])
  return (gate / (1 + np.exp(-gate)) * (x @ pick(p['up']))) @ pick(p['down'])


def moe_oracle(variables, config, x):
  """Returns the output [N, D], scores [N, E] and chosen experts of every token."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables['params'])
  bias = np.asarray(variables['buffers']['router']['selection_bias'], np.float64)
  tokens = x.reshape(-1, D).astype(np.float64)
  scores = 1 / (1 + np.exp(-tokens @ p['router']['weight']))
  out, chosen = np.zeros_like(tokens), []
  for n, token in enumerate(tokens):
    experts = np.argsort(-(scores[n] + bias), kind='stable')[: config.top_k]
    total = sum(scores[n, e] for e in experts)
    for e in experts:
      weight = config.router.scale * scores[n, e] / total
      out[n] += weight * swiglu_oracle(token, p, e)
    if config.shared is not None:
      out[n] += swiglu_oracle(token, p['shared'])
    chosen.append(experts)
  return out, scores, chosen


@pytest.mark.parametrize('shared', [None, 2])
def test_moe(shared):
  config = MoE(experts=5, top_k=2, hidden=3, shared=shared, router=Sigmoid(scale=1.7))
  variables, x, run = setup(config)
  got, reported = run(variables, x, context())
  want, _, chosen = moe_oracle(variables, config, x)
  # Three padding tokens count for nothing, and no routed expert runs for them.
  real, got = SEGMENTS.reshape(-1) > 0, np.asarray(got).reshape(-1, D)
  np.testing.assert_allclose(got[real], want[real], rtol=1e-4, atol=1e-5)
  if shared is None:
    assert not got[~real].any()
  else:
    assert np.abs(got[~real]).max() > 0
    assert variables['params']['shared']['gate'].shape == (D, 2 * 3)
  load = np.zeros(5)
  for experts in np.array(chosen)[real]:
    load[experts] += 1
  np.testing.assert_array_equal(reported['observed']['router']['load'], load)
  assert load.sum() == 2 * real.sum()
  # The load lies beside the bias that it moves.
  assert set(reported['observed']['router']) == {'load'}
  assert set(variables['buffers']['router']) == {'selection_bias'}


@pytest.mark.parametrize(
  ('balance', 'op'),
  [
    (SequenceBalance(weight=0.3), sequence_balance),
    (BatchBalance(weight=0.2), batch_balance),
    (ExpertBalance(weight=0.2), expert_balance),
    (None, None),
  ],
)
def test_balance_loss(balance, op):
  config = MoE(experts=5, top_k=2, hidden=3, balance=balance)
  variables, x, run = setup(config)
  _, reported = run(variables, x, context())
  if balance is None:
    assert 'losses' not in reported
    return
  _, scores, chosen = moe_oracle(variables, config, x)
  real = jnp.asarray(SEGMENTS > 0)
  scores, experts = scores.reshape(B, T, 5), np.reshape(chosen, (B, T, 2))
  want = balance.weight * op(jnp.asarray(scores, jnp.float32), jnp.asarray(experts), real)
  assert float(reported['losses']['balance']) == pytest.approx(float(want), rel=1e-5)
  # What stands in padding does not matter; what stands elsewhere does.
  changed = x.copy()
  changed[0, 3:] += 3
  _, again = run(variables, changed, context())
  assert float(again['losses']['balance']) == float(reported['losses']['balance'])
  changed[1, 0] += 3
  _, other = run(variables, changed, context())
  assert float(other['losses']['balance']) != float(reported['losses']['balance'])


def test_router_learns_from_the_output_and_from_the_balance_loss():
  variables, x, run = setup(MoE(experts=5, top_k=2, hidden=3, balance=SequenceBalance(weight=1.0)))

  @jax.jit
  def gradients(params):
    def both(params):
      y, reported = run({**variables, 'params': params}, x, context())
      return jnp.stack([jnp.sum(jnp.sin(y)), reported['losses']['balance']])

    # Not `jacrev`: it maps over directions, which `ragged_dot` cannot be mapped over.
    pull = jax.vjp(both, params)[1]
    return [pull(direction)[0] for direction in jnp.eye(2)]

  of_output, of_balance = gradients(variables['params'])
  for grads in (of_output, of_balance):
    assert np.max(np.abs(grads['router']['weight'])) > 1e-4
  # The balance loss teaches the router and nothing else.
  for name in ('gate', 'up', 'down'):
    assert np.max(np.abs(of_output[name])) > 1e-4
    np.testing.assert_array_equal(of_balance[name], 0)


def test_parts_obey_their_protocols():
  config = MoE(experts=5, top_k=2, hidden=3)
  assert isinstance(config.router, RouterConfig)
  assert isinstance(config.dispatch, Dispatch)
  assert isinstance(config.balance, Balance)


@pytest.mark.parametrize(
  ('fields', 'text'),
  [
    ({'experts': 0}, '`experts`'),
    ({'top_k': 9}, '`top_k`'),
    ({'shared': 0}, '`shared`'),
    ({'balance': DeviceBalance(devices=3)}, 'balance: `devices`'),
    (
      {'balance': Several(losses=(ExpertBalance(), CommunicationBalance(devices=5, kept=2)))},
      'balance: `devices`',
    ),
    ({'router': Sigmoid(groups=3, kept_groups=1)}, 'router: `groups`'),
    ({'router': Sigmoid(groups=4, kept_groups=1), 'top_k': 3}, 'router: `kept_groups`'),
  ],
)
def test_wrong_fields(fields, text):
  with pytest.raises(ConfigError, match=text):
    MoE(**{'experts': 8, 'top_k': 2, 'hidden': 3, **fields})


def test_wrong_balance():
  for kind in (SequenceBalance, BatchBalance, ExpertBalance):
    with pytest.raises(ConfigError, match='weight'):
      kind(weight=0.0)
  with pytest.raises(ConfigError, match='`kept` is 3'):
    CommunicationBalance(devices=2, kept=3)
  with pytest.raises(ConfigError, match='`devices` is 0'):
    DeviceBalance(devices=0)
  with pytest.raises(ConfigError, match='`losses` is empty'):
    Several(losses=())


def test_several_losses_are_summed_and_can_be_written_as_text():
  text = (
    'Several(losses=(ExpertBalance(), DeviceBalance(devices=2), '
    'CommunicationBalance(devices=2, kept=1)))'
  )
  config, _ = override(MoE(experts=6, top_k=2, hidden=3), {'balance': text})
  assert [loss.weight for loss in config.balance.losses] == [3e-3, 0.05, 0.02]
  rng = np.random.default_rng(0)
  scores = jnp.asarray(rng.random((B, T, 6)), jnp.float32)
  given = scores, jax.lax.top_k(scores, 2)[1], jnp.asarray(SEGMENTS > 0)
  parts = [float(loss(*given)) for loss in config.balance.losses]
  assert len(set(parts)) == 3
  assert float(config.balance(*given)) == pytest.approx(sum(parts), rel=1e-6)
