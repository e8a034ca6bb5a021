"""Who is at fault and what becomes of them, against plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.breaker import (
  CLOSED,
  HALF_OPEN,
  OPEN,
  finite_experts,
  judge,
  nearest,
  output_faults,
  watch_matrices,
  watch_output,
)
from deepseek_jax.ops.experts import ExpertWeights, apply_experts

COOLDOWN, TRIAL = 3, 2


def oracle(faults):
  """States after every step of one layer, and steps at which weights are made anew."""
  steps, count = faults.shape
  state, since, history, retried = [CLOSED] * count, [0] * count, [], []
  for step in range(steps):
    finished, new = step + 1, list(state)
    sound = any(state[e] == CLOSED and not faults[step, e] for e in range(count))
    for e in range(count):
      waited = finished - since[e]
      if state[e] == OPEN:
        if waited >= COOLDOWN and sound:
          new[e] = HALF_OPEN
          retried.append((step, e))
      elif faults[step, e]:
        new[e] = OPEN
      elif state[e] == HALF_OPEN and waited >= TRIAL:
        new[e] = CLOSED
      if new[e] != state[e]:
        since[e] = finished
    state = new
    history.append(state)
  return np.array(history), retried


@pytest.mark.parametrize('rate', [0.05, 0.3, 0.7])
def test_judge(rate):
  """Two layers at once; where faults are many, no expert is left to copy and all stay open."""
  faults = np.random.default_rng(0).random((60, 2, 4)) < rate

  @jax.jit
  def run(faults):
    def step(carry, given):
      fault, finished = given
      verdict = judge(*carry, fault, finished, cooldown=COOLDOWN, trial=TRIAL)
      return verdict[:2], verdict

    start = (jnp.zeros((2, 4)), jnp.zeros((2, 4)))
    return jax.lax.scan(step, start, (faults, jnp.arange(1, 61)))[1]

  found = run(faults)
  for layer in range(2):
    states, retried = oracle(faults[:, layer])
    np.testing.assert_array_equal(found.state[:, layer], states)
    assert [tuple(x) for x in np.argwhere(found.retried[:, layer])] == retried
    before = np.concatenate([np.zeros((1, 4)), states[:-1]])
    np.testing.assert_array_equal(found.opened[:, layer], (states == OPEN) & (before != OPEN))
    np.testing.assert_array_equal(found.passed[:, layer], (states == CLOSED) & (before != CLOSED))
    assert retried or rate == 0.7


def test_nearest():
  generator = np.random.default_rng(1)
  healthy, start = generator.random((20, 5)) < 0.4, generator.integers(0, 5, (20, 5))
  found = np.asarray(jax.jit(nearest)(healthy, start.astype(np.int32)))
  for row in range(20):
    for e in range(5):
      tried = [(start[row, e] + away) % 5 for away in range(5)]
      want = next((t for t in tried if healthy[row, t]), start[row, e])
      assert found[row, e] == want


def test_finite_experts():
  matrices = [np.ones((6, 3, 4), np.float32), np.ones((6, 4, 3), np.float32)]
  matrices[0][1, 2, 3], matrices[1][2, 0, 0] = np.nan, np.inf
  matrices[0][4, 0, 0], matrices[1][4, 0, 0] = np.inf, -np.inf
  matrices[0][5] = 3e38
  found = jax.jit(finite_experts)(tuple(map(jnp.asarray, matrices)))
  np.testing.assert_array_equal(found, [True, False, False, True, False, False])


def layer(matrices, x, experts, weights):
  """A layer of experts as `MoE` puts it together; differentiated by matrices and state."""

  def run(matrices, state):
    watched, signal = watch_matrices(tuple(matrices), state)
    y = apply_experts(x, experts, weights, ExpertWeights(*watched))
    return watch_output(y, signal)

  return run


def setting():
  rng = np.random.default_rng(2)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
  matrices = ExpertWeights(draw(4, 6, 5), draw(4, 6, 5), draw(4, 5, 6))
  experts = jnp.asarray([[0, 1], [1, 2], [2, 0], [1, 0], [2, 4]], jnp.int32)
  return matrices, draw(5, 6), experts, jnp.asarray(rng.random((5, 2)), jnp.float32), draw(5, 6)


def broken_backward(matrices, expert):
  """Weights whose output is 0 and whose gradient overflows."""
  gate, up, down = matrices
  return ExpertWeights(
    gate.at[expert].set(0), up.at[expert].multiply(1e20), down.at[expert].multiply(1e20)
  )


def test_watching_changes_nothing_and_tells_who():
  matrices, x, experts, weights, grad = setting()

  @jax.jit
  def pull(matrices, grad):
    y, back = jax.vjp(layer(matrices, x, experts, weights), matrices, jnp.zeros(4))
    return y, *back(grad)

  plain, back = jax.vjp(lambda m: apply_experts(x, experts, weights, m), matrices)
  y, grads, told = pull(matrices, grad)
  np.testing.assert_array_equal(y, plain)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), grads, back(grad)[0])
  np.testing.assert_array_equal(told, 0)
  # One expert's gradient overflows of itself.
  y, grads, told = pull(broken_backward(matrices, 2), grad)
  assert np.isfinite(y).all()
  assert not np.isfinite(grads.gate[2]).all()
  np.testing.assert_array_equal(told, [0, 0, 1, 0])
  # What came back was spoilt already: in one row, and so in the gradients of some experts alone.
  y, grads, told = pull(matrices, grad.at[0, 0].set(np.nan))
  assert not np.isfinite(grads.gate[0]).all()
  assert np.isfinite(grads.gate[2]).all()
  np.testing.assert_array_equal(told, 0)


def test_output_faults():
  matrices, x, experts, weights, _ = setting()
  huge = ExpertWeights(*(w.at[1].multiply(1e30) for w in matrices))

  @jax.jit
  def find(matrices, x):
    def run(experts, weights):
      return apply_experts(x, experts, weights, matrices)

    return output_faults(run, x, apply_experts(x, experts, weights, matrices), experts, 4)

  np.testing.assert_array_equal(find(matrices, x), 0)
  np.testing.assert_array_equal(find(huge, x), [0, 1, 0, 0])
  # A row that is spoilt already accuses nobody; another of the same expert still does.
  np.testing.assert_array_equal(find(matrices, x.at[3].set(np.inf)), 0)
  np.testing.assert_array_equal(find(huge, x.at[3].set(np.nan)), [0, 1, 0, 0])
  np.testing.assert_array_equal(find(huge, x.at[:].set(np.nan)), 0)
