"""Mixing weights and mixing of lanes against float64 loops, and against published numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.hyper_connections import (
  collapse,
  head_mix,
  lane_logits,
  sinkhorn,
  site_mixes,
  spread,
)

EPSILON = 1e-6


def test_published_numbers():
  """What the released code makes of sin 1 … sin 24."""
  logits = jnp.sin(jnp.arange(1.0, 25.0))[None, None]
  mixes = site_mixes(logits, jnp.zeros(24), jnp.ones(3), 20, EPSILON)
  near = lambda got, want: np.testing.assert_allclose(got[0, 0], want, atol=1e-6)  # noqa: E731
  near(mixes.read, [0.698776, 0.712857, 0.535223, 0.319342])
  near(mixes.write, [0.554187, 0.861194, 1.317166, 1.457922])
  near(
    mixes.carry,
    [
      [0.371830, 0.221250, 0.177989, 0.228931],
      [0.142961, 0.391506, 0.353568, 0.111964],
      [0.051974, 0.099299, 0.310252, 0.538474],
      [0.433235, 0.287944, 0.158190, 0.120630],
    ],
  )


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def sinkhorn_oracle(logits, iterations):
  """One matrix [R, R] in float64."""
  matrix = np.exp(logits - logits.max(axis=1, keepdims=True))
  matrix = matrix / matrix.sum(axis=1, keepdims=True) + EPSILON
  for turn in range(iterations):
    if turn:
      matrix = matrix / (matrix.sum(axis=1, keepdims=True) + EPSILON)
    matrix = matrix / (matrix.sum(axis=0, keepdims=True) + EPSILON)
  return matrix


def site_oracle(stream, output, matrix, base, gates, iterations):
  """Input of the sublayer [T, D] and new stream [T, R, D] of one row, token by token."""
  tokens, lanes, width = stream.shape
  inputs, after = np.zeros((tokens, width)), np.zeros_like(stream)
  for t in range(tokens):
    flat = stream[t].reshape(-1)
    numbers = (flat @ matrix) / np.sqrt(np.mean(flat**2) + EPSILON)
    read = sigmoid(numbers[:lanes] * gates[0] + base[:lanes]) + EPSILON
    write = 2 * sigmoid(numbers[lanes : 2 * lanes] * gates[1] + base[lanes : 2 * lanes])
    square = (numbers[2 * lanes :] * gates[2] + base[2 * lanes :]).reshape(lanes, lanes)
    carry = sinkhorn_oracle(square, iterations)
    for lane in range(lanes):
      inputs[t] += read[lane] * stream[t, lane]
      after[t, lane] = write[lane] * output[t]
      for source in range(lanes):
        after[t, lane] += carry[source, lane] * stream[t, source]
  return inputs, after


def site(stream, output, matrix, base, gates, iterations):
  logits = lane_logits(stream, matrix, EPSILON)
  mixes = site_mixes(logits, base, gates, iterations, EPSILON)
  return collapse(stream, mixes.read), spread(stream, output, mixes.write, mixes.carry)


def inputs(lanes, length, width=5):
  rng = np.random.default_rng(lanes)
  many = lanes * (lanes + 2)
  return (
    rng.standard_normal((2, length, lanes, width)),
    rng.standard_normal((2, length, width)),
    rng.standard_normal((lanes * width, many)) / 2,
    rng.standard_normal(many),
    np.array([0.7, 1.3, -0.9]),
  )


@pytest.mark.parametrize(('lanes', 'length', 'iterations'), [(4, 7, 20), (2, 37, 1), (3, 1, 3)])
def test_a_site_equals_the_loop(lanes, length, iterations):
  given = inputs(lanes, length)
  got = jax.jit(lambda *a: site(*a, iterations))(*(jnp.asarray(x, jnp.float32) for x in given))
  for row in range(2):
    want = site_oracle(given[0][row], given[1][row], *given[2:], iterations)
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a[row], b, rtol=2e-5, atol=2e-5)


def test_gradients_of_a_site():
  """All backward passes written by hand, against differences in float64."""
  given = inputs(4, 3)
  rng = np.random.default_rng(9)
  weights = [rng.standard_normal((2, 3, 5)), rng.standard_normal((2, 3, 4, 5))]
  arrays = [jnp.asarray(x, jnp.float32) for x in given]

  def loss(*a):
    return sum(jnp.sum(w * y) for w, y in zip(weights, site(*a, 20)))

  def exact(*a):
    total = 0.0
    for row in range(2):
      out = site_oracle(a[0][row], a[1][row], *a[2:], 20)
      total += sum(np.sum(w[row] * y) for w, y in zip(weights, out))
    return total

  grads = jax.jit(jax.grad(loss, argnums=tuple(range(5))))(*arrays)
  for place, grad in enumerate(grads):
    for _ in range(3):
      direction = rng.standard_normal(given[place].shape)
      step = 1e-5
      ends = []
      for sign in (1, -1):
        moved = list(given)
        moved[place] = given[place] + sign * step * direction
        ends.append(exact(*moved))
      want = (ends[0] - ends[1]) / (2 * step)
      got = float(np.sum(np.asarray(grad, np.float64) * direction))
      scale = np.linalg.norm(grad) * np.linalg.norm(direction)
      assert scale > 0.1
      assert abs(got - want) < 2e-5 * scale, place


def test_rows_and_columns_sum_to_one():
  logits = jnp.asarray(np.random.default_rng(0).normal(0, 1, (2, 45, 4, 4)), jnp.float32)
  matrix = np.asarray(sinkhorn(logits, 20, EPSILON))
  np.testing.assert_allclose(matrix.sum(-1), 1, atol=1e-3)
  np.testing.assert_allclose(matrix.sum(-2), 1, atol=1e-5)
  assert matrix.min() >= 0


def test_sinkhorn_survives_large_logits():
  """A gate that has grown must not make what is not finite, nor its gradient."""
  logits = jnp.asarray(np.random.default_rng(0).normal(0, 200, (1, 9, 4, 4)), jnp.float32)
  value, grad = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(sinkhorn(x, 20, EPSILON))))(logits)
  assert np.isfinite(value)
  assert np.isfinite(grad).all()


def test_gradient_keeps_no_matrix_of_every_iteration():
  """What is kept of 20 iterations: two matrices, and divisors [R] of each."""
  logits = jnp.zeros((1, 8, 4, 4))
  _, pull = jax.vjp(lambda x: sinkhorn(x, 20, EPSILON), logits)
  kept = sum(leaf.size for leaf in jax.tree.leaves(pull))
  assert kept <= 8 * (2 * 16 + 39 * 4 + 8)


def test_padding_and_bfloat16():
  """A stream of zeros gives finite gradients; half precision stays near float32."""
  given = [jnp.asarray(x, jnp.float32) for x in inputs(4, 5)]
  given[0] = given[0].at[:, 3:].set(0)

  @jax.jit
  def run(*a):
    out, pull = jax.vjp(lambda *b: site(*b, 20), *a)
    return out, pull(jax.tree.map(jnp.ones_like, out))

  want = run(*given)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(want))
  half = [x.astype(jnp.bfloat16) for x in given[:2]]
  got = run(*half, *given[2:])
  assert [leaf.dtype for leaf in got[0]] == [jnp.bfloat16] * 2
  assert [leaf.dtype for leaf in got[1][:3]] == [jnp.bfloat16] * 2 + [jnp.float32]
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.max(np.abs(np.asarray(a, np.float32) - b)) < 0.03 * np.max(np.abs(b))


def test_head():
  logits = jnp.asarray([[[0.0, 2.0]]])
  got = head_mix(logits, jnp.asarray([0.5, -1.0]), jnp.asarray([2.0]), EPSILON)
  np.testing.assert_allclose(got[0, 0], sigmoid(np.array([0.5, 3.0])) + EPSILON, rtol=1e-6)
