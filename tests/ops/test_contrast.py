"""Contrastive losses against loops over pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.contrast import Pairs, info_nce, sigmoid_pairs, unit


def made(seed=0):
  rng = np.random.default_rng(seed)
  left, right = (unit(jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)) for _ in range(2))
  return Pairs(left, right, jnp.array([True, True, False, True, True, True]))


def counts_of(similarity, others, hardness):
  """How often each negative counts: as often as all together, shared out by nearness."""
  if not hardness:
    return dict.fromkeys(others, 1.0)
  share = {m: np.exp(hardness * similarity[m]) for m in others}
  return {m: len(others) * value / sum(share.values()) for m, value in share.items()}


def info_oracle(pairs, scale, hardness):
  left, right = (np.asarray(x, np.float64) for x in pairs[:2])
  real = [n for n in range(6) if pairs.real[n]]
  result = np.zeros(6)
  for n in real:
    for a, b in ((left, right), (right, left)):
      similarity = b @ a[n]
      counts = counts_of(similarity, [m for m in real if m != n], hardness)
      rest = sum(count * np.exp(scale * similarity[m]) for m, count in counts.items())
      own = np.exp(scale * similarity[n])
      result[n] -= np.log(own / (own + rest)) / 2
  return result


@pytest.mark.parametrize('hardness', [0.0, 1.5])
def test_info_nce(hardness):
  pairs = made()
  found = info_nce(pairs, pairs, jnp.arange(6), jnp.float32(3.0), hardness)
  np.testing.assert_allclose(found, info_oracle(pairs, 3.0, hardness), rtol=1e-5)
  gradient = jax.grad(
    lambda left: jnp.sum(
      info_nce(pairs._replace(left=left), pairs._replace(left=left), jnp.arange(6), 3.0, hardness)
    )
  )(pairs.left)
  assert np.isfinite(gradient).all()
  assert not gradient[2].any()
  if not hardness:
    step = np.zeros((6, 5))
    step[3, 1] = 1e-4
    up, down = (
      info_oracle(pairs._replace(left=np.asarray(pairs.left, np.float64) + s), 3.0, 0.0).sum()
      for s in (step, -step)
    )
    assert gradient[3, 1] == pytest.approx((up - down) / 2e-4, rel=1e-3)


@pytest.mark.parametrize('hardness', [0.0, 1.5])
def test_sigmoid_pairs(hardness):
  pairs = made(1)
  scale, offset = 4.0, -1.5
  found = sigmoid_pairs(pairs, pairs, jnp.arange(6), scale, offset, hardness)
  left, right = (np.asarray(x, np.float64) for x in pairs[:2])
  real = [n for n in range(6) if pairs.real[n]]
  for n in range(6):
    want = 0.0
    if n in real:
      similarity = right @ left[n]
      counts = counts_of(similarity, [m for m in real if m != n], hardness)
      for m in real:
        sign = 1 if m == n else -1
        loss = np.log1p(np.exp(-sign * (scale * similarity[m] + offset)))
        want += loss * (1.0 if m == n else counts[m])
    assert found[n] == pytest.approx(want, rel=1e-5)


def test_harder_negatives_make_a_larger_loss():
  pairs = made(2)
  losses = [info_nce(pairs, pairs, jnp.arange(6), jnp.float32(3.0), h).sum() for h in (0, 1, 4)]
  assert losses[0] < losses[1] < losses[2]


def test_a_vector_of_zeros_has_a_finite_gradient():
  assert np.isfinite(jax.grad(lambda x: jnp.sum(unit(x)))(jnp.zeros((2, 3)))).all()
