"""Gated attention against its float64 twin, and what its gate learns from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.gated import LATER_WINS, Gated
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.context import text_context


@pytest.mark.parametrize('keep', [0.01, 0.4, 1.0])
def test_gated(keep, sizes, packed, build, oracle):
  config = Gated(**sizes, keep=keep)
  params, run = build(config)
  x, context = packed
  segments, positions = context.segments, context.positions
  gate = (x.astype(np.float64) @ np.asarray(params['gate'], np.float64))[..., 0]
  rank = gate + positions * LATER_WINS

  def allowed(b, t, s):
    past = [u for u in range(t + 1) if segments[b, u] == segments[b, t]]
    count = max(int(np.ceil(round(len(past) * keep, 6))), 1)
    best = sorted(past, key=lambda u: -rank[b, u])[:count]
    return s in best or s == t

  bias = -np.log1p(np.exp(-gate))
  want = oracle(params, config, x, positions, allowed, bias)
  real = segments > 0
  got = np.asarray(run(params, x, context))
  np.testing.assert_allclose(got[real], want[real], rtol=1e-4, atol=1e-5)


def test_gate_learns_from_what_is_kept(sizes, packed, build):
  params, run = build(Gated(**sizes, keep=0.4))
  x, context = packed
  loss = jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(run(p, x, context)[1]))))
  grad = np.asarray(loss(params)[1]['gate'])
  norm = np.linalg.norm(grad)
  assert norm > 1e-3

  def value(sign):
    return float(loss({**params, 'gate': params['gate'] + sign * 1e-2 * grad / norm})[0])

  # The step is too short to change what is kept: the slope is that of the bias alone.
  slope = (value(1) - value(-1)) / 2
  assert slope == pytest.approx(1e-2 * norm, rel=2e-2)


def test_of_equal_tokens_the_later_is_kept(sizes, build):
  params, run = build(Gated(**sizes, keep=0.5))
  x = np.ones((1, 6, 7), np.float32)
  context = text_context(jnp.zeros((1, 6), jnp.int32))

  grad = jax.jit(jax.grad(lambda x: jnp.sum(run(params, x, context)[0, 5])))(x)
  influence = np.max(np.abs(np.asarray(grad)[0]), axis=-1) > 1e-7
  # Half of six: the last three, the query among them.
  np.testing.assert_array_equal(influence, [False, False, False, True, True, True])


def test_visible_tokens():
  assert Gated(heads=1, keep=1.0).visible_tokens(9) == MLA(heads=1).visible_tokens(9)
  # Of t visible tokens ⌈t / 2⌉ are kept; the token itself is missed by the rest of the time.
  want = np.mean([-(-t // 2) + 1 - -(-t // 2) / t for t in range(1, 10)])
  assert Gated(heads=1, keep=0.5).visible_tokens(9) == pytest.approx(want)


@pytest.mark.parametrize('keep', [0.0, -1.0, 1.1])
def test_wrong_share(keep):
  with pytest.raises(ConfigError, match='keep'):
    Gated(heads=1, keep=keep)
