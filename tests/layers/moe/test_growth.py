"""Stages of growth, and what a layer chooses from at each."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.override import override_from_text
from deepseek_jax.layers.context import text_context
from deepseek_jax.layers.moe.breaker import Breaker
from deepseek_jax.layers.moe.growth import Growth
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.cost import active_share, forward_flops
from deepseek_jax.train.step import build_program
from deepseek_jax.train.summary import experiment_weights

GROWTH = Growth(experts=((0, 2), (3, 4), (0.5, 8)), top_k=((0, 1), (6, 2)))


def test_stages():
  """Steps and shares side by side, in the order they come in."""
  assert GROWTH.stages(8, 2, 20) == [(0, 2, 1), (3, 4, 1), (6, 4, 2), (10, 8, 2)]
  active = jax.jit(GROWTH.build(8, 2, 20))
  counts = [tuple(int(n) for n in active(jnp.int32(step))) for step in range(20)]
  want = [(2, 1)] * 3 + [(4, 1)] * 3 + [(4, 2)] * 4 + [(8, 2)] * 10
  assert counts == want
  alone = Growth(top_k=((0, 1), (4, 2)))
  assert alone.stages(8, 2, 5) == [(0, 8, 1), (4, 8, 2)]
  assert alone.first(8, 2) == (8, 1)


def test_a_layer_chooses_from_what_is_active():
  config = MoE(experts=8, top_k=2, hidden=3, growth=GROWTH, balance=None)
  module = config.build()
  x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 6)), jnp.float32)
  context = text_context(jnp.zeros((2, 9), jnp.int32))
  variables = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), x, context))
  buffers = variables['buffers']
  assert float(buffers['active_experts']) == 2
  assert float(buffers['active_choices']) == 1
  run = jax.jit(lambda v: module.apply(v, x, context, mutable=['observed']))

  def load(experts, choices):
    given = {**buffers, 'active_experts': experts, 'active_choices': choices}
    _, reported = run({**variables, 'buffers': jax.tree.map(jnp.float32, given)})
    seen = reported['observed']['router']
    np.testing.assert_array_equal(seen['allowed'], np.arange(8) < experts)
    return np.asarray(seen['load'])

  for experts, choices in ((2, 1), (4, 1), (8, 2)):
    found = load(experts, choices)
    assert found.sum() == 18 * choices
    assert np.all(found[experts:] == 0)
    assert np.sum(found[:experts] > 0) > experts // 2
  # The whole of it is the layer without growth.
  plain = dataclasses.replace(config, growth=None).build()
  rest = {'params': variables['params'], 'buffers': {'router': buffers['router']}}
  given = {**buffers, 'active_experts': 8.0, 'active_choices': 2.0}
  whole = {**variables, 'buffers': jax.tree.map(jnp.float32, given)}
  np.testing.assert_allclose(run(whole)[0], plain.apply(rest, x, context), rtol=1e-6, atol=1e-6)


def test_share_of_flops():
  """Counted by hand: a choice is three products of width by hidden, in two layers and MTP's."""
  config, _ = override_from_text(
    tiny_mla.get_config(),
    {'model.feed_forward.growth': 'Growth(experts=((0, 4), (5, 8)), top_k=((0, 1), (0.25, 2)))'},
  )
  program = build_program(config, jax.devices()[:1])
  forward = forward_flops(config.model, experiment_weights(program), 64)
  share = active_share(config.model, forward, 20)
  spared = 3 * (2 * 3 * 32 * 16)
  np.testing.assert_allclose(share[:5], 1 - spared / forward)
  np.testing.assert_array_equal(share[5:], 1)
  assert 0.8 < share[0] < 0.99


@pytest.mark.parametrize(
  ('fields', 'text'),
  [
    ({}, 'neither'),
    ({'experts': ((1, 4),)}, 'the first at 0'),
    ({'experts': ()}, 'the first at 0'),
    ({'experts': ((0, 4), (5, 2))}, 'falls'),
    ({'experts': ((0, 4), (5, 8), (5, 8))}, '5 is not after 5'),
    ({'top_k': ((0, 1), (1.5, 2))}, '1.5 is no share'),
    ({'top_k': ((0, 0), (3, 2))}, 'found stage'),
    ({'top_k': ((0, 1),), 'noise': -1.0}, '`noise`'),
  ],
)
def test_impossible_growths(fields, text):
  with pytest.raises(ConfigError, match=text):
    Growth(**fields)


@pytest.mark.parametrize(
  ('growth', 'text'),
  [
    (Growth(experts=((0, 2), (5, 4))), 'growth: `experts` ends at 4; expected the 8'),
    (Growth(top_k=((0, 1),)), 'growth: `top_k` ends at 1; expected the 2'),
    (Growth(experts=((0, 1), (5, 8))), 'growth: begins with 1 experts for 2 choices'),
  ],
)
def test_growth_ends_at_the_layer(growth, text):
  with pytest.raises(ConfigError, match=text):
    MoE(experts=8, top_k=2, hidden=3, growth=growth)


@pytest.mark.parametrize(
  ('changes', 'text'),
  [
    ({'growth': 'Growth(top_k=((0, 1), (20, 2)))'}, '2 at step 20, but the run has 20 steps'),
    ({'growth': 'Growth(experts=((0, 2), (6, 4), (0.1, 8)))'}, '8 at step 2, not after step 6'),
    (
      {'growth': 'Growth(experts=((0, 1), (6, 8)), top_k=((0, 1), (0.1, 2)))'},
      '1 experts for 2 choices a token at step 2',
    ),
  ],
)
def test_growth_fits_into_the_run(changes, text):
  changes = {f'model.feed_forward.{name}': value for name, value in changes.items()}
  config, _ = override_from_text(tiny_mla.get_config(), changes)
  assert any(text in message for message in config.check(1))


def test_a_breaker_needs_a_guard():
  changes = {'model.feed_forward.breaker': 'Breaker()', 'guard': 'None'}
  config, _ = override_from_text(tiny_mla.get_config(), changes)
  assert config.model.feed_forward.breaker == Breaker()
  assert any('breaker counts on a guard' in message for message in config.check(1))
  for fields in ({'cooldown': 0}, {'trial': 0}, {'noise': -0.1}):
    with pytest.raises(ConfigError):
      Breaker(**fields)
