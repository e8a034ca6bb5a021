"""Balance losses against explicit loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.balance import (
  batch_balance,
  communication_balance,
  device_balance,
  expert_balance,
  raw_choices,
  sequence_balance,
  z_loss,
)
from deepseek_jax.ops.routing import RULED_OUT

CHOICES = jnp.zeros((3, 7, 2), jnp.int32)
"""Choices that are somebody's; the losses of raw scores ask for no more."""


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
  got = sequence_balance(jnp.asarray(scores), CHOICES, jnp.asarray(real))
  want = sum(balance_oracle(scores[b], real[b], 2) for b in range(3))
  assert float(got) == pytest.approx(want, rel=1e-6)


def test_batch_balance(tokens):
  scores, real = tokens
  got = batch_balance(jnp.asarray(scores), CHOICES, jnp.asarray(real))
  want = 3 * balance_oracle(scores.reshape(21, 5), real.reshape(21), 2)
  assert float(got) == pytest.approx(want, rel=1e-6)
  assert want != pytest.approx(sum(balance_oracle(scores[b], real[b], 2) for b in range(3)))


@pytest.mark.parametrize('balance', [sequence_balance, batch_balance])
def test_balance_of_padding_alone_is_zero(balance, tokens):
  real = jnp.zeros((3, 7), bool)
  value, grad = jax.value_and_grad(balance)(jnp.asarray(tokens[0]), CHOICES, real)
  assert value == 0
  np.testing.assert_array_equal(grad, np.zeros((3, 7, 5)))


@pytest.mark.parametrize('balance', [sequence_balance, batch_balance])
def test_even_load_costs_one_a_sequence_and_uneven_load_more(balance):
  # Token t prefers experts t and t + 1: every expert is chosen twice, mean scores are equal.
  even = np.stack([np.roll([0.9, 0.8, 0.1, 0.1], t) for t in range(4)]).astype(np.float32)
  real = jnp.ones((2, 4), bool)
  choices = jnp.zeros((2, 4, 2), jnp.int32)
  assert float(balance(jnp.asarray([even, even]), choices, real)) == pytest.approx(2.0, rel=1e-6)
  uneven = np.broadcast_to(even[0], (2, 4, 4))
  assert float(balance(jnp.asarray(uneven), choices, real)) > 2.5


def test_batch_balance_lets_sequences_specialise():
  first, second = [0.9, 0.1], [0.1, 0.9]
  scores = jnp.asarray([[first] * 3, [second] * 3])
  real = jnp.ones((2, 3), bool)
  choices = jnp.zeros((2, 3, 1), jnp.int32)
  assert float(batch_balance(scores, choices, real)) == pytest.approx(2.0, rel=1e-6)
  assert float(sequence_balance(scores, choices, real)) == pytest.approx(2 * 1.8, rel=1e-6)


def test_balance_gradient_flows_through_mean_scores(tokens):
  scores, real = tokens
  grad = jax.jit(jax.grad(sequence_balance))(jnp.asarray(scores), CHOICES, jnp.asarray(real))
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


def chosen_oracle(scores, experts, real, devices, kept):
  """Equations 23 to 31 of DeepSeek-V2 for one sequence: expert, device and communication loss."""
  count, rows = scores.shape[-1], np.flatnonzero(real)
  top_k, size = experts.shape[-1], count // devices
  members = [range(d * size, (d + 1) * size) for d in range(devices)]
  f = [count / (top_k * len(rows)) * sum(i in experts[t] for t in rows) for i in range(count)]
  p = [sum(scores[t, i] / scores[t].sum() for t in rows) / len(rows) for i in range(count)]
  device, communication = 0.0, 0.0
  for group in members:
    probability = sum(p[i] for i in group)
    device += sum(f[i] for i in group) / size * probability
    sent = sum(any(i in experts[t] for i in group) for t in rows)
    communication += devices / (kept * len(rows)) * sent * probability
  return sum(a * b for a, b in zip(f, p)), device, communication


@pytest.mark.parametrize(('devices', 'kept'), [(2, 1), (3, 2), (6, 3)])
def test_losses_of_true_choices(tokens, devices, kept):
  real, rng = tokens[1], np.random.default_rng(4)
  scores = rng.random((3, 7, 6)).astype(np.float32)
  experts = np.argsort(rng.random((3, 7, 6)), axis=-1)[..., :3].astype(np.int32)
  want = sum(
    np.array(chosen_oracle(scores[b].astype(float), experts[b], real[b], devices, kept))
    for b in range(3)
  )
  got = [
    expert_balance(scores, experts, real),
    device_balance(scores, experts, real, devices),
    communication_balance(scores, experts, real, devices, kept),
  ]
  np.testing.assert_allclose(got, want, rtol=1e-5)
  # With an expert a device and a device a choice, all three are the same.
  assert len({round(float(x), 3) for x in got}) == (1 if devices == 6 else 3)


def test_what_is_nobodys_counts_for_nothing(tokens):
  """Losses are those of a router with fewer choices."""
  scores, real = jnp.asarray(tokens[0]), tokens[1]
  best = jax.lax.top_k(scores, 3)[1]
  none, fewer = best.at[..., 2].set(5), best[..., :2]
  np.testing.assert_array_equal(raw_choices(scores, none)[..., :2], fewer)
  for loss in (
    sequence_balance,
    batch_balance,
    expert_balance,
    lambda *given: device_balance(*given, 5),
    lambda *given: communication_balance(*given, 5, 2),
  ):
    got, want, three = (float(loss(scores, chosen, real)) for chosen in (none, fewer, best))
    assert got == pytest.approx(want, rel=1e-6)
    assert got != pytest.approx(three, rel=1e-3)
  # A row of padding costs nothing.
  assert float(communication_balance(scores, best, jnp.zeros_like(real), 5, 2)) == 0
