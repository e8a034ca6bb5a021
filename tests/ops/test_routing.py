"""Expert choice and balance statistics against explicit loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.routing import (
  chosen_mask,
  expert_load,
  group_limited_top_k,
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
