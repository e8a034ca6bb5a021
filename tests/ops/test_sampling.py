"""Sampling against loops over rows and tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops import sampling

B, V = 5, 13


def random_logits(seed=0):
  return np.random.default_rng(seed).normal(size=(B, V)).astype(np.float32) * 2


def softmax(row):
  e = np.exp(row.astype(np.float64) - row.max())
  return e / e.sum()


def slow_kept(logits, rule):
  """Minus infinity for all tokens but those a rule names, row by row."""
  result = np.full_like(logits, -np.inf)
  for row, values in enumerate(logits):
    for token in rule(values):
      result[row, token] = values[token]
  return result


def ranked(values):
  return sorted(range(len(values)), key=lambda token: (-values[token], token))


def nucleus(p):
  def rule(values):
    kept, mass = [], 0.0
    for token in ranked(values):
      if mass >= p and kept:
        break
      kept.append(token)
      mass += softmax(values)[token]
    return kept

  return rule


@pytest.mark.parametrize('k', [1, 2, 6, V, V + 4])
def test_top_k(k):
  logits = random_logits()
  logits[0, 3:9] = 5.0  # equals: exactly k remain, lower ids first
  expected = slow_kept(logits, lambda values: ranked(values)[:k])
  np.testing.assert_array_equal(jax.jit(sampling.keep_top_k, static_argnums=1)(logits, k), expected)
  assert np.isfinite(expected[0]).sum() == min(k, V)


@pytest.mark.parametrize('p', [1e-6, 0.3, 0.75, 0.97, 1.0])
def test_top_p(p):
  logits = random_logits()
  expected = slow_kept(logits, nucleus(p)) if p < 1 else logits
  np.testing.assert_array_equal(jax.jit(sampling.keep_top_p, static_argnums=1)(logits, p), expected)
  if p == 1e-6:
    np.testing.assert_array_equal(np.isfinite(expected).sum(axis=-1), 1)


def test_top_p_takes_the_smallest_set_that_reaches_the_mass():
  logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.05, 0.85, 0.05, 0.05]]))
  kept = np.isfinite(sampling.keep_top_p(logits, 0.65))
  np.testing.assert_array_equal(kept, [[0, 1, 0, 1], [0, 1, 0, 0]])


@pytest.mark.parametrize('p', [0.0, 0.05, 0.4, 1.0])
def test_min_p(p):
  logits = random_logits()
  expected = slow_kept(
    logits, lambda values: [t for t in range(V) if softmax(values)[t] >= p * softmax(values).max()]
  )
  np.testing.assert_array_equal(jax.jit(sampling.keep_min_p, static_argnums=1)(logits, p), expected)


def test_dropped_tokens_stay_dropped_through_a_chain():
  logits = random_logits()
  logits = sampling.keep_top_k(logits, 4)
  for keep, value in ((sampling.keep_top_p, 0.99999), (sampling.keep_min_p, 1e-9)):
    np.testing.assert_array_equal(keep(logits, value), logits)


def test_temperature():
  logits = random_logits()
  np.testing.assert_allclose(sampling.apply_temperature(logits, 0.5), logits * 2, rtol=1e-6)
  wide = sampling.apply_temperature(jnp.asarray(logits, jnp.bfloat16), 1.0)
  assert wide.dtype == jnp.float32


def test_best():
  logits = random_logits()
  logits[2, 4] = logits[2, 9] = 50
  best = sampling.take_best(logits)
  assert best.dtype == jnp.int32
  np.testing.assert_array_equal(best, [ranked(values)[0] for values in logits])


def test_draws_follow_the_probabilities():
  row = np.log(np.array([0.5, 0.25, 0.2, 0.05], np.float32))
  row = np.append(row, -np.inf).astype(np.float32)
  draws = 20_000
  keys = jax.random.split(jax.random.key(0), draws)
  tokens = jax.jit(sampling.sample)(jnp.tile(row, (draws, 1)), keys)
  assert tokens.dtype == jnp.int32
  frequency = np.bincount(tokens, minlength=5) / draws
  np.testing.assert_allclose(frequency, softmax(row), atol=0.015)  # over four deviations
  assert frequency[4] == 0


def test_a_row_does_not_depend_on_its_batch():
  logits = random_logits()
  keys = jax.random.split(jax.random.key(1), B)
  together = sampling.sample(logits, keys)
  for row in range(B):
    alone = sampling.sample(logits[row : row + 1], keys[row : row + 1])
    assert alone[0] == together[row]
  flipped = sampling.sample(logits[::-1], keys[::-1])
  np.testing.assert_array_equal(flipped[::-1], together)


@pytest.mark.parametrize(
  'make', [lambda: jax.random.key(0), lambda: jax.random.split(jax.random.key(0), B + 1),
           lambda: jnp.zeros((B, 2), jnp.uint32)]
)  # fmt: skip
def test_keys_must_be_one_a_row(make):
  with pytest.raises(ValueError, match='one a row'):
    sampling.sample(random_logits(), make())


def test_drafts_stand_as_often_as_they_should():
  """By hand: of q = (½, ½, 0) and p = (¼, ¼, ½) half of the drafts stand."""
  target = jnp.asarray([[[0.25, 0.25, 0.5], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0]]])
  proposal = jnp.asarray([[[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]]])
  drafts = jnp.asarray([[1, 2]])

  def decide(*uniforms):
    count, rest = sampling.accept_drafts(target, proposal, drafts, jnp.asarray([uniforms]))
    return int(count[0]), np.asarray(rest[0]) / float(rest.sum())

  count, rest = decide(0.51, 0.0)
  assert count == 0
  np.testing.assert_allclose(rest, [0, 0, 1])
  count, rest = decide(0.49, 0.999)
  assert count == 2
  np.testing.assert_allclose(rest, [1, 0, 0])
  # Equal but for rounding: what is left is no distribution, so the target is drawn from.
  same, draft = jnp.asarray([[[0.0, 1.0], [0.0, 1.0]]]), jnp.asarray([[0]])
  count, rest = sampling.accept_drafts(same, same[:, :1], draft, jnp.zeros((1, 1)))
  assert count[0] == 0
  np.testing.assert_array_equal(rest, [[0, 1]])
