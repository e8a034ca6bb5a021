"""Averaged weights against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.optim.ema import EMA


@pytest.mark.parametrize('rule', [EMA(decay=0.9), EMA(decay=0.5, warmup_steps=1)])
def test_average_follows_its_definition(rule):
  generator = np.random.default_rng(0)
  weights = generator.normal(size=(60, 3)).astype(np.float32)
  expected = start = generator.normal(size=3)
  average = {'a': jnp.float32(start)}
  update = jax.jit(rule.update)
  for count, new in enumerate(weights):
    average = update(average, {'a': jnp.asarray(new)}, jnp.int32(count))
    decay = min(rule.decay, (1 + count) / (rule.warmup_steps + count))
    expected = decay * expected + (1 - decay) * new
    np.testing.assert_allclose(average['a'], expected, atol=1e-5)


def test_the_beginning_is_soon_forgotten():
  """With the warm-up, the first weights weigh little after a few updates; without, a lot."""

  def left(rule):
    average = {'a': jnp.float32(1)}
    for count in range(20):
      average = rule.update(average, {'a': jnp.float32(0)}, jnp.int32(count))
    return float(average['a'])

  assert left(EMA(decay=0.999)) < 1e-4
  assert left(EMA(decay=0.999, warmup_steps=1)) == pytest.approx(0.999**20, rel=1e-5)


@pytest.mark.parametrize('dials', [{'decay': 1.0}, {'decay': -0.1}, {'warmup_steps': 0}])
def test_impossible_averages(dials):
  with pytest.raises(ConfigError):
    EMA(**dials)
