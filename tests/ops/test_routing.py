"""Expert choice and balance statistics against explicit loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.routing import (
  batch_balance,
  chosen_mask,
  expert_load,
  group_limited_top_k,
  sequence_balance,
)


def choose(scores, selection, groups, kept_groups, top_k):
  run = jax.jit(group_limited_top_k, static_argnames=('groups', 'kept_groups', 'top_k'))
  return run(
    jnp.asarray(scores, jnp.float32),
    jnp.asarray(selection, jnp.float32),
    groups=groups,
    kept_groups=kept_groups,
    top_k=top_k,
  )


def choose_oracle(selection, groups, kept_groups, top_k):
  """The experts of one token, best first."""
  size = len(selection) // groups
  groups_of = [range(g * size, (g + 1) * size) for g in range(groups)]
  value = [sum(sorted((selection[e] for e in group), reverse=True)[:2]) for group in groups_of]
  kept = sorted(range(groups), key=lambda g: -value[g])[:kept_groups]
  allowed = [e for g in kept for e in groups_of[g]]
  return sorted(allowed, key=lambda e: -selection[e])[:top_k]


def test_golden_router():
  i = np.arange(1, 17)
  scores = 1 / (1 + np.exp(-2 * np.sin(i)))
  selection = scores + 0.1 * np.cos(i)
  experts, picked = choose(scores[None], selection[None], 4, 2, 4)
  np.testing.assert_array_equal(experts, [[0, 7, 6, 1]])
  weights = picked / jnp.sum(picked) * 2.5
  np.testing.assert_allclose(weights, [[0.625512, 0.651659, 0.584630, 0.638199]], atol=2e-6)
  best_two = np.sort(selection.reshape(4, 4), axis=1)[:, 2:].sum(axis=1)
  np.testing.assert_allclose(best_two, [1.716107, 1.727562, 0.943213, 1.681765], atol=1e-6)


@pytest.mark.parametrize(
  ('experts', 'groups', 'kept_groups', 'top_k'),
  [(8, 1, 1, 3), (8, 4, 2, 2), (12, 3, 1, 4), (6, 6, 3, 3), (8, 4, 4, 8), (5, 1, 1, 5)],
)
def test_group_limited_top_k(experts, groups, kept_groups, top_k):
  rng = np.random.default_rng(0)
  scores = rng.random((37, experts))
  selection = scores + 0.5 * rng.standard_normal(experts)
  got, picked = choose(scores, selection, groups, kept_groups, top_k)
  assert got.dtype == jnp.int32
  want = [choose_oracle(row, groups, kept_groups, top_k) for row in selection]
  np.testing.assert_array_equal(got, want)
  np.testing.assert_allclose(picked, np.take_along_axis(scores, np.array(want), 1), rtol=1e-6)


def test_dropped_groups_stay_dropped_where_selection_is_negative():
  scores = np.array([[0.9, 0.1, 0.2, 0.3]])
  selection = scores - 5.0
  got, picked = choose(scores, selection, 2, 1, 2)
  # With dropped groups masked by 0, experts 2 and 3 would beat the negative scores.
  np.testing.assert_array_equal(got, [[0, 1]])
  np.testing.assert_allclose(picked, [[0.9, 0.1]], rtol=1e-6)


def test_bias_chooses_but_does_not_weigh():
  scores = np.array([[0.6, 0.5, 0.4]])
  got, picked = choose(scores, scores + [0.0, 0.0, 1.0], 1, 1, 2)
  np.testing.assert_array_equal(got, [[2, 0]])
  np.testing.assert_allclose(picked, [[0.4, 0.6]], rtol=1e-6)


def test_gradient_reaches_the_scores_of_chosen_experts_alone():
  scores = jnp.array([[0.6, 0.5, 0.4, 0.1]])

  def total(scores, selection):
    return jnp.sum(
      group_limited_top_k(scores, selection, groups=1, kept_groups=1, top_k=2)[1]
      * jnp.array([2.0, 3.0])
    )

  grads = jax.jit(jax.grad(total, argnums=(0, 1)))(scores, scores)
  np.testing.assert_array_equal(grads[0], [[2.0, 3.0, 0.0, 0.0]])
  np.testing.assert_array_equal(grads[1], np.zeros((1, 4)))


def test_chosen_mask_and_load():
  experts = jnp.array([[0, 2], [2, 1], [3, 0], [3, 2]])
  want = np.zeros((4, 5))
  for n, row in enumerate(np.asarray(experts)):
    want[n, row] = 1
  np.testing.assert_array_equal(chosen_mask(experts, 5), want)
  real = jnp.array([True, True, False, True])
  load = expert_load(experts, real, 5)
  assert load.dtype == jnp.float32
  np.testing.assert_array_equal(load, [1, 1, 3, 1, 0])
  assert float(jnp.sum(load)) == 2 * 3


def balance_oracle(scores, real, top_k):
  """Equations 17 to 20 of the DeepSeek-V3 report, for one group of tokens."""
  experts = scores.shape[-1]
  rows = [scores[t].astype(np.float64) for t in range(len(scores)) if real[t]]
  total = 0.0
  for i in range(experts):
    count = sum(i in np.argsort(-row, kind='stable')[:top_k] for row in rows)
    frequency = experts / (top_k * len(rows)) * count
    probability = sum(row[i] / row.sum() for row in rows) / len(rows)
    total += frequency * probability
  return total


@pytest.fixture
def tokens():
  rng = np.random.default_rng(1)
  scores = rng.random((3, 7, 5)).astype(np.float32)
  real = np.ones((3, 7), bool)
  real[0, 5:] = False
  real[2, 1:] = False
  return scores, real


def test_sequence_balance(tokens):
  scores, real = tokens
  got = sequence_balance(jnp.asarray(scores), jnp.asarray(real), 2)
  want = sum(balance_oracle(scores[b], real[b], 2) for b in range(3))
  assert float(got) == pytest.approx(want, rel=1e-6)


def test_batch_balance(tokens):
  scores, real = tokens
  got = batch_balance(jnp.asarray(scores), jnp.asarray(real), 2)
  want = 3 * balance_oracle(scores.reshape(21, 5), real.reshape(21), 2)
  assert float(got) == pytest.approx(want, rel=1e-6)
  assert want != pytest.approx(sum(balance_oracle(scores[b], real[b], 2) for b in range(3)))


@pytest.mark.parametrize('balance', [sequence_balance, batch_balance])
def test_balance_of_padding_alone_is_zero(balance, tokens):
  real = jnp.zeros((3, 7), bool)
  value, grad = jax.value_and_grad(balance)(jnp.asarray(tokens[0]), real, 2)
  assert value == 0
  np.testing.assert_array_equal(grad, np.zeros((3, 7, 5)))


@pytest.mark.parametrize('balance', [sequence_balance, batch_balance])
def test_even_load_costs_one_a_sequence_and_uneven_load_more(balance):
  # Token t prefers experts t and t + 1: every expert is chosen twice, mean scores are equal.
  even = np.stack([np.roll([0.9, 0.8, 0.1, 0.1], t) for t in range(4)]).astype(np.float32)
  real = jnp.ones((2, 4), bool)
  assert float(balance(jnp.asarray([even, even]), real, 2)) == pytest.approx(2.0, rel=1e-6)
  uneven = np.broadcast_to(even[0], (2, 4, 4))
  assert float(balance(jnp.asarray(uneven), real, 2)) > 2.5


def test_batch_balance_lets_sequences_specialise():
  first, second = [0.9, 0.1], [0.1, 0.9]
  scores = jnp.asarray([[first] * 3, [second] * 3])
  real = jnp.ones((2, 3), bool)
  assert float(batch_balance(scores, real, 1)) == pytest.approx(2.0, rel=1e-6)
  assert float(sequence_balance(scores, real, 1)) == pytest.approx(2 * 1.8, rel=1e-6)


def test_balance_gradient_flows_through_mean_scores(tokens):
  scores, real = tokens
  grad = jax.jit(jax.grad(sequence_balance), static_argnums=2)(
    jnp.asarray(scores), jnp.asarray(real), 2
  )
  step, place = 1e-3, (1, 3, 4)
  moved = [scores.astype(np.float64).copy() for _ in range(2)]
  moved[0][place] += step
  moved[1][place] -= step
  # The step changes no choice, so the frequencies stay.
  chosen = [np.argsort(-m[1, 3], kind='stable')[:2].tolist() for m in moved]
  assert chosen[0] == chosen[1]
  high, low = (balance_oracle(m[1], real[1], 2) for m in moved)
  assert float(grad[place]) == pytest.approx((high - low) / (2 * step), rel=1e-3)
  np.testing.assert_array_equal(grad[~real], np.zeros_like(grad[~real]))
