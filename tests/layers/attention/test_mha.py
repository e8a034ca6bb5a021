"""Multi-head attention against its float64 twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.mha import MHA
from deepseek_jax.layers.attention.rope import RoPE
from deepseek_jax.layers.norm import RMSNorm

KINDS = {
  'plain': MHA(heads=3, head_dim=5, rope=None),
  'grouped': MHA(heads=4, kv_heads=2, head_dim=6, rope=RoPE(theta=50.0), norm=RMSNorm()),
}


def turn(x, position, frequencies):
  """Rotates pairs of neighbouring channels of x [K]."""
  numbers = (x[0::2] + 1j * x[1::2]) * np.exp(1j * position * frequencies)
  return np.stack([numbers.real, numbers.imag], axis=-1).reshape(x.shape)


def mha_oracle(params, c, x, positions, segments):
  """Returns [B, T, D], one query and head at a time."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x = np.asarray(x, np.float64)
  query, key, value = (np.einsum('btd,dhk->bthk', x, p[n]) for n in ('query', 'key', 'value'))

  def ready(head, name, position):
    if c.norm is not None:
      head = head / np.sqrt(np.mean(head**2) + 1e-6) * p[f'{name}_norm']['scale']
    return head if c.rope is None else turn(head, position, c.rope.frequencies(c.head_dim))

  out = np.zeros(x.shape)
  for b, t, h in np.ndindex(*x.shape[:2], c.heads):
    q = ready(query[b, t, h], 'query', positions[b, t])
    g = h * c.groups // c.heads
    seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
    keys = [ready(key[b, s, g], 'key', positions[b, s]) for s in seen]
    scores = np.array([q @ k for k in keys]) / np.sqrt(c.head_dim)
    weights = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    out[b, t] += sum(w * value[b, s, g] for w, s in zip(weights, seen)) @ p['output'][h]
  return out


@pytest.mark.parametrize('kind', KINDS)
def test_mha(kind, packed, build):
  config = KINDS[kind]
  params, run = build(config)
  x, context = packed
  assert params['key'].shape[1] == config.groups
  want = mha_oracle(params, config, x, context.positions, context.segments)
  got, real = np.asarray(run(params, x, context)), context.segments > 0
  np.testing.assert_allclose(got[real], want[real], rtol=1e-4, atol=1e-5)
  assert np.isfinite(got).all()


def test_flops():
  # 1 + … + 9 pairs over 9 tokens; two products of 3 heads of 5 channels.
  assert MHA(heads=3, head_dim=5, rope=None).mixing_flops(9) == 45 / 9 * 2 * 2 * 3 * 5


def test_the_cache_holds_key_heads_alone():
  cache = KINDS['grouped'].empty_cache(2, 7, jnp.bfloat16)
  assert cache.key.shape == cache.value.shape == (2, 7, 2, 6)


@pytest.mark.parametrize(
  ('fields', 'names'),
  [
    ({'heads': 0, 'kv_heads': 0, 'head_dim': 0}, ['heads', 'kv_heads', 'head_dim']),
    ({'heads': 4, 'kv_heads': 3}, ['kv_heads']),
    ({'heads': 4, 'head_dim': 5}, ['head_dim']),
  ],
)
def test_wrong_fields(fields, names):
  with pytest.raises(ConfigError) as caught:
    MHA(**fields)
  assert [m.split('`')[1] for m in caught.value.messages] == names
