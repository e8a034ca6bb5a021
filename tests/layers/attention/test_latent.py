"""MLA against its float64 twin, and its absorbed form against its expanded one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention import latent
from deepseek_jax.layers.attention.latent import MLA, absorbing_is_cheaper
from deepseek_jax.layers.attention.rope import RoPE, YaRN
from deepseek_jax.layers.attention.window import Window
from deepseek_jax.layers.context import Context, text_context

YARN = RoPE(theta=100.0, yarn=YaRN(factor=8.0, original_length=32))


@pytest.mark.parametrize(('query_latent', 'rope'), [(None, RoPE(theta=50.0)), (3, YARN)])
def test_mla(query_latent, rope, sizes, packed, build, oracle):
  config = MLA(**sizes, query_latent=query_latent, rope=rope)
  params, run = build(config)
  x, context = packed
  segments = context.segments

  def allowed(b, t, s):
    return s <= t and segments[b, t] == segments[b, s]

  want = oracle(params, config, x, context.positions, allowed)
  got = np.asarray(run(params, x, context))
  real = segments > 0
  np.testing.assert_allclose(got[real], want[real], rtol=1e-4, atol=1e-5)
  assert np.all(np.isfinite(got))


@pytest.mark.parametrize('query_latent', [None, 3])
def test_absorbed_equals_expanded(query_latent, sizes, packed, build, monkeypatch):
  config = MLA(**sizes, query_latent=query_latent, rope=YARN)
  params, _ = build(config)
  x, _ = packed
  context = text_context(jnp.ones(x.shape[:2], jnp.int32))

  def run(absorb):
    monkeypatch.setattr(latent, 'absorbing_is_cheaper', lambda *_: absorb)
    module = config.build()

    def total(params, x):
      # Half of the slots stay empty.
      cache = config.empty_cache(x.shape[0], 2 * x.shape[1], x.dtype)
      y = module.apply({'params': params}, x, context, cache)[0]
      return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(params, x)

  expanded, absorbed = run(False), run(True)
  for a, b in zip(jax.tree.leaves(absorbed), jax.tree.leaves(expanded)):
    assert np.max(np.abs(b)) > 1e-3
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_absorbing_is_for_few_queries():
  config = MLA(heads=128)
  assert absorbing_is_cheaper(config, queries=1, keys=4096)
  assert absorbing_is_cheaper(config, queries=3, keys=4096)
  assert not absorbing_is_cheaper(config, queries=4096, keys=4096)
  # One token in all: both expand one token; the expanded scores are shorter.
  assert not absorbing_is_cheaper(config, queries=1, keys=1)


def test_softmax_scale_of_v3():
  rope = RoPE(yarn=YaRN(factor=40.0, original_length=4096))
  assert MLA(heads=128, rope=rope).softmax_scale == pytest.approx(0.135234, abs=5e-7)
  assert MLA(heads=128).softmax_scale == pytest.approx(192**-0.5)


def test_mixing_flops():
  config = MLA(heads=3, nope_dim=4, rope_dim=2, value_dim=5)
  # 1 + 2 + … + 9 pairs over 9 tokens; each 3 heads × 2 × (6 multiply-adds of scores, 5 of values).
  assert config.mixing_flops(9) == 45 / 9 * 3 * 2 * (6 + 5)


def test_wrong_sizes_are_all_named():
  with pytest.raises(ConfigError) as caught:
    MLA(heads=0, latent=-1, rope_dim=3)
  assert [m.split('`')[1] for m in caught.value.messages] == ['heads', 'latent', 'rope_dim']


def test_output_keeps_bfloat16(sizes, packed, build):
  params, run = build(MLA(**sizes))
  x, context = packed
  exact = run(params, x, context)
  got = run(params, jnp.asarray(x, jnp.bfloat16), context)
  assert got.dtype == jnp.bfloat16
  assert np.max(np.abs(np.asarray(got, np.float32) - exact)) < 0.05 * np.max(np.abs(exact))


def sizes_in(jaxpr):
  """The sizes of all arrays that a program makes, those of its loops among them."""
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield variable.aval.size
    is_program = lambda x: hasattr(x, 'eqns')  # noqa: E731
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
      if is_program(inner):
        yield from sizes_in(inner)


@pytest.mark.parametrize('size', [3, 8], ids=['absorbed', 'expanded'])
@pytest.mark.parametrize('kind', [MLA, functools.partial(Window, size=6000)], ids=['mla', 'window'])
def test_a_prompt_with_a_cache_needs_no_mask(kind, size, sizes):
  """Neither scores nor a mask of all pairs exist while a prompt joins what is remembered."""
  config = kind(**sizes | {'latent': size})
  assert absorbing_is_cheaper(config, 512, 8192) == (size == 3)
  module, tokens, slots = config.build(), 512, 8192
  shape = jax.ShapeDtypeStruct((1, tokens, 7), jnp.float32)
  ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
  context = Context(tokens=ids, positions=ids, segments=ids)
  cache = jax.eval_shape(lambda: config.empty_cache(1, slots, jnp.float32))
  params = jax.eval_shape(module.init, jax.random.key(0), shape, context)
  jaxpr = jax.make_jaxpr(module.apply)(params, shape, context, cache)
  assert max(sizes_in(jaxpr.jaxpr)) < tokens * slots / 2
