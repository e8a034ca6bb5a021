"""The bias rule and the measures of balance against loops over experts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.optim.balance import (
  ProportionalBias,
  SignBias,
  dead_fraction,
  load_entropy,
  max_violation,
  update_bias,
  update_buffers,
)
from deepseek_jax.optim.schedule import MultiStep

LOAD = np.array([[3, 0, 7, 2, 3], [4, 4, 4, 4, 4], [0, 0, 9, 0, 0]], np.float32)


def slow_bias(bias, load, rate):
  result = bias.copy()
  for row in range(bias.shape[0]):
    mean = sum(load[row].tolist()) / load.shape[1]
    for expert in range(load.shape[1]):
      if load[row, expert] < mean:
        result[row, expert] += rate
      elif load[row, expert] > mean:
        result[row, expert] -= rate
  return result


def test_update_bias_equals_the_oracle():
  bias = np.random.default_rng(0).normal(size=LOAD.shape).astype(np.float32)
  expected = slow_bias(bias, LOAD, 0.01)
  assert np.any(expected[0] > bias[0])
  assert np.any(expected[0] < bias[0])
  assert expected[0, 0] == bias[0, 0], 'expert at the mean stays'
  new = jax.jit(update_bias)(bias, LOAD, jnp.float32(0.01))
  assert new.dtype == jnp.float32
  np.testing.assert_allclose(new, expected, atol=1e-7)
  np.testing.assert_array_equal(new[1], bias[1])


def test_proportional_bias_equals_the_oracle():
  rule = ProportionalBias(rate=0.1)
  bias = np.random.default_rng(0).normal(size=LOAD.shape).astype(np.float32)
  expected = np.array(
    [
      [b + 0.1 * (sum(load) / 5 - x) / (sum(load) / 5) for b, x in zip(biases, load)]
      for biases, load in zip(bias.tolist(), LOAD.tolist())
    ]
  )
  new = jax.jit(lambda b, x: update_bias(b, x, rule.build(3)(0), rule.direction))(bias, LOAD)
  np.testing.assert_allclose(new, expected, atol=1e-6)
  assert new[0, 1] == pytest.approx(bias[0, 1] + 0.1), 'nobody chose it: the whole rate'
  # The size of the batch does not matter, and without a token nothing moves.
  again = update_bias(bias, 10 * LOAD, 0.1, rule.direction)
  np.testing.assert_allclose(again, new, atol=1e-6)
  np.testing.assert_array_equal(update_bias(bias, 0 * LOAD, 0.1, rule.direction), bias)
  with pytest.raises(ConfigError, match='rate'):
    ProportionalBias(rate=-1.0)


@pytest.mark.parametrize('rule', [SignBias(), ProportionalBias()])
@pytest.mark.parametrize('experts', [3, 7, 49])
@pytest.mark.parametrize('count', [1, 11, 12345])
def test_a_perfectly_even_load_moves_nothing(experts, count, rule):
  bias = jnp.zeros(experts)
  new = update_bias(bias, jnp.full(experts, count), 1.0, rule.direction)
  np.testing.assert_array_equal(new, bias)


def test_repeated_updates_balance_a_skewed_router():
  rng = np.random.default_rng(1)
  scores = rng.uniform(size=(400, 6)) + np.linspace(0, 0.5, 6)
  bias = jnp.zeros(6)

  def load_of(bias):
    chosen = np.argsort(-(scores + np.asarray(bias)), axis=-1)[:, :2]
    return jnp.asarray(np.bincount(chosen.ravel(), minlength=6), jnp.float32)

  before = max_violation(load_of(bias))
  for _ in range(200):
    bias = update_bias(bias, load_of(bias), 0.005)
  assert max_violation(load_of(bias)) < 0.1 < 0.5 < before


def test_update_buffers_follows_the_addresses():
  bias = jnp.zeros((3, 5))
  other = jnp.ones(4)
  buffers = {
    'layers_0': {'feed_forward': {'router': {'selection_bias': bias}}},
    'layers_1': {'router': {'selection_bias': bias[1], 'table': other}, 'memory': other},
  }
  observed = {
    'layers_0': {'feed_forward': {'router': {'load': LOAD, 'scores': jnp.ones(2)}}, 'entropy': 1},
    'layers_1': {'router': {'load': LOAD[0]}},
    'head': {'norm': jnp.ones(())},
  }
  new = update_buffers(buffers, observed, 0.5)
  assert jax.tree.structure(new) == jax.tree.structure(buffers)
  np.testing.assert_array_equal(
    new['layers_0']['feed_forward']['router']['selection_bias'],
    slow_bias(np.zeros((3, 5), np.float32), LOAD, 0.5),
  )
  np.testing.assert_array_equal(
    new['layers_1']['router']['selection_bias'],
    slow_bias(np.zeros((1, 5), np.float32), LOAD[:1], 0.5)[0],
  )
  assert new['layers_1']['router']['table'] is other
  assert new['layers_1']['memory'] is other
  np.testing.assert_array_equal(
    buffers['layers_1']['router']['selection_bias'], 0, 'the argument is untouched'
  )
  assert update_buffers({}, observed, 0.5) == {}
  moved = update_buffers(buffers, observed, 0.5, ProportionalBias().direction)
  np.testing.assert_allclose(
    moved['layers_1']['router']['selection_bias'], 0.5 * (3 - LOAD[0]) / 3, atol=1e-6
  )


@pytest.mark.parametrize(
  'observed', [{}, {'router': {}}, {'router': {'scores': LOAD}}, {'load': LOAD}]
)
def test_a_bias_without_load_is_an_error(observed):
  buffers = {'router': {'selection_bias': jnp.zeros((3, 5))}}
  with pytest.raises(ValueError, match="'router/selection_bias' needs 'router/load'"):
    update_buffers(buffers, observed, 0.1)


def test_a_load_of_another_shape_is_an_error():
  buffers = {'selection_bias': jnp.zeros(5)}
  with pytest.raises(ValueError, match=r"'load' has shape \(3, 5\), expected \(5,\)"):
    update_buffers(buffers, {'load': LOAD}, 0.1)


def test_measures_equal_the_oracle():
  for row, load in enumerate(LOAD.tolist()):
    mean = sum(load) / len(load)
    shares = [x / sum(load) for x in load if x > 0]
    entropy = -sum(p * math.log(p) for p in shares) / math.log(len(load))
    np.testing.assert_allclose(max_violation(LOAD)[row], (max(load) - mean) / mean, atol=1e-6)
    np.testing.assert_allclose(dead_fraction(LOAD)[row], load.count(0) / len(load), atol=1e-6)
    np.testing.assert_allclose(load_entropy(LOAD)[row], entropy, atol=1e-6)
  np.testing.assert_allclose(load_entropy(LOAD)[1:], [1, 0], atol=1e-6)
  assert max_violation(LOAD[None]).shape == (1, 3)


def test_measures_without_any_token_are_finite():
  empty = jnp.zeros((2, 3))
  np.testing.assert_array_equal(max_violation(empty), 0)
  np.testing.assert_array_equal(dead_fraction(empty), 1)
  np.testing.assert_array_equal(load_entropy(empty), 0)
  with pytest.raises(ValueError, match='expected at least 2'):
    load_entropy(jnp.ones((2, 1)))


def test_rate_follows_its_schedule():
  fn = SignBias(rate=0.01, schedule=MultiStep(warmup_steps=0, boundaries=(0.5,), factor=0.0)).build(
    10
  )
  np.testing.assert_allclose([fn(0), fn(4), fn(5)], [0.01, 0.01, 0])
  np.testing.assert_allclose(SignBias().build(10)(3), 1e-3)
  with pytest.raises(ConfigError, match=r'SignBias.rate: found -1.0'):
    SignBias(rate=-1.0)


@pytest.mark.parametrize('rule', [SignBias(rate=0.5), ProportionalBias(rate=0.5)])
def test_experts_that_may_not_be_chosen_are_left_alone(rule):
  """Those that may move as if there were no others."""
  load, bias = jnp.float32([3, 0, 9, 0, 6, 2]), jnp.arange(6, dtype=jnp.float32)
  allowed = jnp.float32([2, 0, 2, 0, 2, 2])
  new = update_bias(bias, load, 0.5, rule.direction, allowed)
  kept = np.array([0, 2, 4, 5])
  alone = update_bias(bias[kept], load[kept], 0.5, rule.direction)
  np.testing.assert_array_equal(new[kept], alone)
  np.testing.assert_array_equal(new[np.array([1, 3])], [1, 3])
  seen = {'router': {'load': load, 'allowed': allowed}}
  moved = update_buffers({'router': {'selection_bias': bias}}, seen, 0.5, rule.direction)
  np.testing.assert_array_equal(moved['router']['selection_bias'], new)
