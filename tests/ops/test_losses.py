"""Chunked cross-entropy against its reference, and the reference against float64 loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.losses import (
  chunked_choice,
  chunked_cross_entropy,
  cross_entropy_reference,
)

B, T, D, V = 2, 7, 5, 11


def inputs(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.standard_normal((B, T, D)), dtype)
  head = jnp.asarray(rng.standard_normal((D, V)), dtype)
  targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
  weights = jnp.asarray(rng.random((B, T)), jnp.float32)
  # Padding in the middle and at the end of a row.
  return hidden, head, targets, weights.at[0, 5:].set(0).at[1, 2].set(0)


def loss_oracle(hidden, head, targets, weights):
  logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
  total = 0.0
  for b in range(B):
    for t in range(T):
      row = logits[b, t]
      log_p = row[targets[b, t]] - np.log(np.sum(np.exp(row)))
      total -= float(weights[b, t]) * log_p
  return total


@functools.cache
def jitted(chunk):
  loss = cross_entropy_reference if chunk is None else chunked_cross_entropy

  def run(hidden, head, targets, weights):
    arguments = (targets, weights) if chunk is None else (targets, weights, chunk)
    return 1.7 * loss(hidden, head, *arguments)

  return jax.jit(jax.value_and_grad(run, argnums=(0, 1)))


def test_reference():
  arguments = inputs()
  assert float(cross_entropy_reference(*arguments)) == pytest.approx(
    loss_oracle(*arguments), rel=1e-6
  )


@pytest.mark.parametrize('chunk', [1, 2, 3, 7, 128])
def test_chunked(chunk):
  arguments = inputs()
  want, grads = jitted(None)(*arguments)
  got, got_grads = jitted(chunk)(*arguments)
  assert got.dtype == jnp.float32
  assert float(got) == pytest.approx(float(want), rel=1e-6)
  for a, b in zip(got_grads, grads):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  # What has no weight teaches nothing.
  assert np.all(np.asarray(got_grads[0])[np.asarray(arguments[3]) == 0] == 0)
  # Without a gradient asked for, another path computes the value.
  alone = jax.jit(chunked_cross_entropy, static_argnums=4)(*arguments, chunk)
  assert 1.7 * float(alone) == pytest.approx(float(want), rel=1e-6)


def test_no_weight_at_all():
  hidden, head, targets, weights = inputs()
  value, grads = jitted(3)(hidden, head, targets, 0 * weights)
  assert value == 0
  assert all(not np.any(g) for g in grads)


def test_bfloat16():
  arguments = inputs(jnp.bfloat16)
  got, got_grads = jitted(3)(*arguments)
  assert got.dtype == jnp.float32
  # Logits are float32 sums of bfloat16 products: the value is as exact as in float32.
  assert float(got) == pytest.approx(1.7 * loss_oracle(*arguments), rel=1e-5)
  wide = jitted(None)(*(a.astype(jnp.float32) for a in arguments[:2]), *arguments[2:])[1]
  for a, b in zip(got_grads, wide):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0.03, atol=0.02)


def test_large_logits_do_not_overflow():
  hidden, head, targets, weights = inputs()
  value, grads = jitted(3)(100 * hidden, 100 * head, targets, weights)
  assert np.isfinite(value)
  assert all(np.all(np.isfinite(g)) for g in grads)


@pytest.mark.parametrize('chunk', [1, 3, 7, 128])
def test_choice(chunk):
  """As from all logits at once; of equal logits the first."""
  hidden, head, targets, weights = inputs()
  head = head.at[:, 10].set(head[:, 8])
  nats, chosen = chunked_choice(hidden, head, targets, weights, chunk)
  want = np.argmax(np.asarray(hidden) @ np.asarray(head), axis=-1)
  assert chosen.dtype == jnp.int32
  assert (want == 8).any()
  np.testing.assert_array_equal(chosen, want)
  expected = cross_entropy_reference(hidden, head, targets, weights)
  assert float(nats) == pytest.approx(float(expected), rel=1e-6)
