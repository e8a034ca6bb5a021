"""Attention to a memory: against its float64 twin, and with its keys and values in a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.cross import CrossAttention
from deepseek_jax.layers.attention.interface import AttentionConfig
from deepseek_jax.layers.context import Memory, text_context

CONFIG = CrossAttention(heads=3, head_dim=5, slots=6)
SEGMENTS = np.array([[1, 1, 2, 0], [1, 1, 1, 1]], np.int32)


@pytest.fixture(scope='module')
def memory():
  """Vectors [2, 4, 7] for two documents and one; one is padding."""
  rng = np.random.default_rng(4)
  values = rng.standard_normal((2, 4, 7)).astype(np.float32)
  return Memory(values=values, positions=np.zeros((2, 4), np.int32), segments=SEGMENTS)


@pytest.fixture(scope='module')
def ready(memory):
  """Parameters, and the module run on rows, context and cache."""
  module, x = CONFIG.build(), jnp.zeros((2, 4, 7))
  context = dataclasses.replace(text_context(jnp.ones((2, 4), jnp.int32)), memory=memory)
  params = jax.tree.map(
    lambda box: box.value,
    module.init(jax.random.key(0), x, context)['params'],
    is_leaf=lambda box: hasattr(box, 'value'),
  )
  return params, jax.jit(lambda x, c, cache=None: module.apply({'params': params}, x, c, cache))


def cross_oracle(params, x, segments, memory):
  """Returns [B, T, D], one query and head at a time."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  query = np.einsum('btd,dhk->bthk', x, p['query'])
  key, value = (np.einsum('bsd,dhk->bshk', memory.values, p[n]) for n in ('key', 'value'))
  out = np.zeros(x.shape)
  for b, t, h in np.ndindex(*x.shape[:2], CONFIG.heads):
    seen = [s for s in range(4) if memory.segments[b, s] == segments[b, t] > 0]
    if seen:
      weights = np.exp([query[b, t, h] @ key[b, s, h] / np.sqrt(CONFIG.head_dim) for s in seen])
      mixed = sum(w * value[b, s, h] for w, s in zip(weights / weights.sum(), seen))
      out[b, t] += mixed @ p['output'][h]
  return out


def test_tokens_see_the_memory_of_their_segment(packed, ready, memory):
  x, context = packed
  params, run = ready
  want = cross_oracle(params, x, context.segments, memory)
  got, _ = run(x, dataclasses.replace(context, memory=memory))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  # Padding sees nothing.
  assert not np.asarray(got)[0, 7:].any()
  assert np.abs(want[0, 4:7]).max() > 0.01


def test_a_cache_remembers_the_memory(ready, memory):
  """It is given with the first tokens alone; later ones see the same."""
  _, run = ready
  x = np.random.default_rng(5).standard_normal((2, 5, 7)).astype(np.float32)
  context = text_context(jnp.ones((2, 5), jnp.int32))
  whole, none = run(x, dataclasses.replace(context, memory=one_segment(memory)))
  assert none is None
  first, rest = (jax.tree.map(lambda a, at=at: a[:, at], context) for at in (slice(2), slice(2, 5)))
  cache = CONFIG.empty_cache(2, 99, jnp.float32)
  begin, cache = run(x[:, :2], dataclasses.replace(first, memory=one_segment(memory)), cache)
  end, _ = run(x[:, 2:], rest, cache)
  np.testing.assert_allclose(jnp.concatenate([begin, end], axis=1), whole, rtol=1e-5, atol=1e-6)


def one_segment(memory):
  """All of it seen by segment 1, but for padding."""
  return memory.replace(segments=np.minimum(memory.segments, 1))


def test_what_is_missing_or_too_much(ready, memory):
  module, (params, _) = CONFIG.build(), ready
  x, context = np.zeros((2, 3, 7), np.float32), text_context(jnp.ones((2, 3), jnp.int32))
  with pytest.raises(ConfigError, match=r'`context\.memory`, which is None'):
    module.apply({'params': params}, x, context)
  small = dataclasses.replace(CONFIG, slots=3).empty_cache(2, 9, jnp.float32)
  with pytest.raises(ConfigError, match='4 vectors does not fit into 3'):
    module.apply({'params': params}, x, dataclasses.replace(context, memory=memory), small)


def test_protocol_and_sizes():
  assert isinstance(CONFIG, AttentionConfig)
  assert CONFIG.mixing_flops(1000) == 2 * 2 * 3 * 5 * 6
  assert CONFIG.empty_cache(2, 1000, jnp.float32).key.shape == (2, 6, 3, 5)
  with pytest.raises(ConfigError) as caught:
    CrossAttention(heads=0, head_dim=0, slots=0)
  assert len(caught.value.messages) == 3
