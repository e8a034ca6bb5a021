"""The TPU's kernels against the slow twin, step by step on this machine, and compiled for chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from deepseek_jax.ops.attention.blocked import SHORT, attend_blocked
from deepseek_jax.ops.attention.blocks import Back, Extras, Static
from deepseek_jax.ops.attention.reference import Seen, attend_seen
from deepseek_jax.ops.kernels import attention_tpu

B, T, H, K, V = 1, 256, 4, 24, 16


@pytest.mark.parametrize(
  ('groups', 'window'),
  [
    (2, (40, 0)),
    pytest.param(4, None, marks=pytest.mark.slow),
    pytest.param(1, None, marks=pytest.mark.slow),
  ],
)
def test_values(groups, window):
  """Forward and gradients of two packed documents, with sinks."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
  arrays = draw(B, T, H, K), draw(B, T, groups, K), draw(B, T, groups, V)
  grad, sinks = draw(B, T, H, V), draw(H)
  places = np.concatenate([np.arange(90), np.arange(T - 90)]).astype(np.int32)[None]
  documents = np.repeat([1, 2], [90, T - 90]).astype(np.int32)[None]
  seen, static = Seen(places, places, documents, documents), Static(0.3, window, True)
  extras = Extras(None, sinks)
  assert attention_tpu.fits(*arrays, extras, static)
  out, log_sum = attention_tpu.forward(*arrays, extras, seen, static, interpret=True)
  drift = jnp.sum(out * grad, axis=-1)
  got = attention_tpu.backward(
    *arrays, extras, seen, static, Back(log_sum, drift, grad), interpret=True
  )
  twin = functools.partial(attend_seen, seen=seen, scale=0.3, sinks=sinks, window=window)
  want, pull = jax.vjp(twin, *arrays)
  for a, b in zip((out, *got[:3]), (want, *pull(grad)), strict=True):
    assert np.abs(b).max() > 0.1
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def step(query, key, value, positions, segments, window=None):
  def loss(query, key, value):
    seen = Seen(positions, positions, segments, segments)
    out = attend_blocked(query, key, value, seen, scale=0.1, window=window, in_order=True)
    return jnp.sum(out.astype(jnp.float32) ** 2)

  return jax.value_and_grad(loss, argnums=(0, 1, 2))(query, key, value)


def shapes(length, heads, groups, key_dim, value_dim, sharding=None, dtype=jnp.bfloat16):
  leaf = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
  facts = leaf((2, length), jnp.int32)
  return (
    leaf((2, length, heads, key_dim), dtype),
    leaf((2, length, groups, key_dim), dtype),
    leaf((2, length, groups, value_dim), dtype),
    facts,
    facts,
  )


@pytest.mark.parametrize(
  ('platform', 'length', 'kernels'),
  [('tpu', 2048, 3), ('tpu', 2050, 0), ('tpu', SHORT, 0), ('cpu', 2048, 0), ('cuda', 2048, 0)],
)
def test_each_platform_has_its_form(platform, length, kernels):
  traced = jax.jit(step).trace(*shapes(length, 2, 2, 24, 16))
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert text.count('@tpu_custom_call(') == kernels
  # Short rows are unrolled.
  assert ('stablehlo.while' in text) == (kernels == 0 and length > SHORT)


@pytest.mark.slow
@pytest.mark.parametrize('chip', ['v5p:2x2x1', 'v6e:2x2x1'])
@pytest.mark.parametrize(
  ('case', 'window'),
  [((4096, 16, 16, 192, 128), None), ((4096, 8, 2, 128, 128), (1024, 0))],
  ids=['mla', 'grouped'],
)
def test_tpu_compiles(chip, case, window, monkeypatch):
  """Forward and gradient for chips that are not here."""
  pytest.importorskip('libtpu')
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  device = topologies.get_topology_desc(chip, 'tpu').devices[0]
  arguments = shapes(*case, SingleDeviceSharding(device))
  compiled = jax.jit(functools.partial(step, window=window)).lower(*arguments).compile()
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
