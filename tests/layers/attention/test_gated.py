"""Gated attention against its float64 twin, and what its gate learns from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention import chosen
from deepseek_jax.layers.attention.gated import (
  LATER_WINS,
  Gated,
  Log,
  Share,
  SoftGate,
  StraightThrough,
)
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.context import text_context

CASES = {
  'a little': Gated(heads=2, keep=Share(share=0.01), block=2, window=1),
  'some, no window': Gated(heads=2, keep=Share(share=0.4), block=3, window=0),
  'all': Gated(heads=2, keep=Share(share=1.0), block=4, window=2),
  'logarithm': Gated(heads=2, keep=Log(factor=0.7), block=1, window=1),
  'one block': Gated(heads=2, gradient=StraightThrough()),
  'straight': Gated(heads=2, keep=Log(factor=1.5), block=2, window=0, gradient=StraightThrough()),
}


def keys_of(config, gate, positions, segments, b, t):
  """The keys of a query by the definition, from a mask of all pairs."""
  start = t // config.block * config.block
  rank = gate[b] + positions[b] * LATER_WINS
  past = [
    s
    for s in range(start)
    if segments[b, s] == segments[b, start]
    and positions[b, s] < positions[b, start] - config.window
  ]
  if isinstance(config.keep, Share):
    count = int(np.ceil(round(len(past) * config.keep.share, 6)))
  else:
    count = min(int(np.ceil(config.keep.factor * np.log2(len(past) + 1))), len(past))
  kept = sorted(past, key=lambda s: -rank[s])[:count]
  near = range(max(start - config.window, 0), t + 1)
  return {s for s in [*kept, *near] if segments[b, s] == segments[b, t]}


@pytest.mark.parametrize(
  ('name', 'expanded'), [*((name, 0) for name in CASES), ('some, no window', 100)]
)
def test_gated(name, expanded, sizes, packed, build, oracle, monkeypatch):
  monkeypatch.setattr(chosen, 'EXPANDED', expanded)
  monkeypatch.setattr(chosen, 'CHUNK', 4)
  config = Gated(**{**vars(CASES[name]), **sizes})
  params, run = build(config)
  x, context = packed
  segments, positions = context.segments, context.positions
  gate = (x.astype(np.float64) @ np.asarray(params['gate'], np.float64))[..., 0]

  def allowed(b, t, s):
    return s in keys_of(config, gate, positions, segments, b, t)

  soft = isinstance(config.gradient, SoftGate)
  bias = -np.log1p(np.exp(-gate)) if soft else np.zeros_like(gate)
  want = oracle(params, config, x, positions, allowed, bias)
  real = segments > 0
  got = np.asarray(run(params, x, context))
  np.testing.assert_allclose(got[real], want[real], rtol=1e-4, atol=1e-5)
  assert np.all(np.isfinite(got))


def test_gate_learns_from_what_is_kept(sizes, packed, build):
  params, run = build(Gated(**sizes, keep=Share(share=0.4), block=2, window=1))
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


def test_straight_through_passes_the_gradient_of_a_soft_weight(sizes, packed, build):
  config = Gated(**sizes, keep=Share(share=0.4), block=2, window=1, gradient=StraightThrough())
  params, run = build(config)
  x, context = packed
  grad = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(run(p, x, context)[1]))))(params)
  assert np.linalg.norm(np.asarray(grad['gate'])) > 1e-3
  gate = jnp.array([-2.0, 0.0, 3.0])
  bias, pull = jax.vjp(StraightThrough().bias, gate)
  np.testing.assert_array_equal(bias, 0)
  soft = jax.nn.sigmoid(gate)
  np.testing.assert_allclose(pull(jnp.ones(3))[0], soft * (1 - soft), rtol=1e-5)


def test_of_equal_tokens_the_later_is_kept(sizes, build):
  params, run = build(Gated(**sizes, keep=Share(share=0.5), block=1, window=0))
  x = np.ones((1, 6, 7), np.float32)
  context = text_context(jnp.zeros((1, 6), jnp.int32))

  grad = jax.jit(jax.grad(lambda x: jnp.sum(run(params, x, context)[0, 5])))(x)
  influence = np.max(np.abs(np.asarray(grad)[0]), axis=-1) > 1e-7
  # Half of the five before, rounded up, and the query itself.
  np.testing.assert_array_equal(influence, [False, False, True, True, True, True])


def test_visible_tokens():
  full = Gated(heads=1, keep=Share(share=1.0), block=2, window=1)
  assert full.visible_tokens(9) == MLA(heads=1).visible_tokens(9)
  config = Gated(heads=1, keep=Share(share=0.5), block=2, window=1)
  ones = np.ones((1, 9))
  places = np.arange(9)[None]
  want = np.mean([len(keys_of(config, 0 * ones, places, ones, 0, t)) for t in range(9)])
  assert config.visible_tokens(9) == pytest.approx(want)


def test_log_grows_slowly():
  counts = Log(factor=2.0).counts(1023)
  assert counts[0] == 0
  assert counts[3] == 3
  assert counts[1023] == 20


@pytest.mark.parametrize('share', [0.0, -1.0, 1.1])
def test_wrong_share(share):
  with pytest.raises(ConfigError, match='share'):
    Share(share=share)


def test_wrong_fields():
  with pytest.raises(ConfigError, match='factor'):
    Log(factor=0.0)
  with pytest.raises(ConfigError) as caught:
    Gated(heads=1, block=0, window=-1)
  assert len(caught.value.messages) == 2
