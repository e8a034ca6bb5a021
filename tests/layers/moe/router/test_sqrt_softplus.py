"""The √softplus router against loops, and against golden numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.layers.moe.interface import Limits
from deepseek_jax.layers.moe.router.sqrt_softplus import SqrtSoftplus
from deepseek_jax.ops.routing import RULED_OUT, sqrt_softplus


def test_golden(golden):
  i = np.arange(1, 17)
  got = golden(SqrtSoftplus(scale=1.5), 2 * np.sin(i), 0.1 * np.cos(i), 6)
  np.testing.assert_array_equal(got.experts, [[13, 7, 0, 1, 6, 12]])
  want = [[0.272042, 0.271900, 0.254939, 0.262767, 0.233292, 0.205060]]
  np.testing.assert_allclose(got.weights, want, atol=1e-6)
  assert float(got.scores[0, 0]) == pytest.approx(1.361390, abs=1e-6)


@pytest.mark.parametrize('allowed', [None, {0, 2, 3}])
def test_equals_the_oracle(setup, choose, weigh, allowed):
  config = SqrtSoftplus()
  variables, x, context, apply = setup(config, 7, 4)
  table = None if allowed is None else jnp.array([e in allowed for e in range(7)])
  got = apply(variables, x, context, Limits(allowed=table))
  logits = x.reshape(-1, 4).astype(np.float64) @ np.asarray(variables['params']['weight'])
  scores = np.sqrt(np.log(1 + np.exp(logits)))
  want = choose(scores + variables['buffers']['selection_bias'], 4, allowed=allowed)
  np.testing.assert_array_equal(got.experts, want)
  picked = weigh(scores, want)
  weights = config.scale * picked / picked.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(got.weights, weights, rtol=1e-5)
  if allowed is not None:
    assert np.all(np.asarray(got.experts)[:, 3] == 7), 'three experts for four choices'
    scores[:, [1, 4, 5, 6]] = 0
  np.testing.assert_allclose(got.scores, scores, rtol=1e-5)


def test_gradient_of_the_score_is_finite_everywhere():
  x = jnp.array([RULED_OUT, -200.0, -104.0, -80.0, -1.0, 0.0, 3.0, 200.0])
  value, grad = jax.jit(jax.vmap(jax.value_and_grad(sqrt_softplus)))(x)
  wide = np.asarray(x, np.float64)
  want = np.sqrt(np.logaddexp(wide, 0))
  np.testing.assert_allclose(value, np.where(wide < -103, 0, want), rtol=1e-5)
  with np.errstate(under='ignore'):
    slope = 1 / (1 + np.exp(np.minimum(-wide, 700))) / (2 * np.where(want > 0, want, 1))
  np.testing.assert_allclose(grad, np.where(wide < -103, 0, slope), rtol=1e-5)
