"""Balance losses against explicit loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.balance import batch_balance, sequence_balance, z_loss
from deepseek_jax.ops.routing import RULED_OUT


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


def test_z_loss(tokens):
  real, rng = tokens[1], np.random.default_rng(2)
  logits = rng.normal(0, 9, (3, 7, 5)).astype(np.float32)
  value, grad = jax.jit(jax.value_and_grad(z_loss))(logits, real)
  want = 0.0
  for b in range(3):
    squares = [
      np.log(np.sum(np.exp(logits[b, t].astype(float)))) ** 2 for t in np.flatnonzero(real[b])
    ]
    want += sum(squares) / len(squares)
  assert float(value) == pytest.approx(want, rel=1e-5)
  np.testing.assert_array_equal(np.any(np.asarray(grad) != 0, axis=-1), real)
  # Experts that are ruled out count for nothing, and an empty row costs nothing.
  padded = np.pad(logits, ((0, 0), (0, 0), (0, 2)), constant_values=RULED_OUT)
  assert float(z_loss(padded, real)) == pytest.approx(want, rel=1e-5)
  assert float(z_loss(logits, np.zeros_like(real))) == 0
