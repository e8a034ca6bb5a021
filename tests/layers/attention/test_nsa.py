"""Native sparse attention against its float64 twin, its cache, and its choice of blocks."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.nsa import NSA
from deepseek_jax.layers.attention.rope import RoPE
from deepseek_jax.layers.context import Context, packed_context

CONFIG = NSA(
  heads=4,
  kv_heads=2,
  head_dim=6,
  value_dim=5,
  span=4,
  stride=2,
  block=4,
  blocks=4,
  initial=1,
  local=2,
  window=3,
  rope=RoPE(theta=50.0),
)
WIDTH = 7


@functools.cache
def params():
  """Weights away from their start, place encodings among them."""
  x = np.zeros((1, 2, WIDTH), np.float32)
  shapes = jax.eval_shape(CONFIG.build().init, jax.random.key(0), x, packed_context([(2,)], 2))
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32),
    nn.meta.unbox(shapes['params']),
  )


def activations(rows, length, seed=0):
  return np.random.default_rng(seed).standard_normal((rows, length, WIDTH)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(3,))
def run(params, x, context, config=CONFIG):
  return config.build().apply({'params': params}, x, context)[0]


def turn(x, position):
  """Rotates pairs of neighbouring channels of x [..., K]."""
  frequencies = CONFIG.rope.frequencies(CONFIG.head_dim)
  numbers = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * position * frequencies)
  return np.stack([numbers.real, numbers.imag], axis=-1).reshape(x.shape)


def softmax_mix(query, keys, values):
  """Returns the mix of values and the weights; nothing seen is nothing mixed."""
  if not len(keys):
    return np.zeros(CONFIG.value_dim), np.zeros(0)
  scores = np.array([query @ key for key in keys]) / np.sqrt(CONFIG.head_dim)
  weights = np.exp(scores - scores.max())
  weights /= weights.sum()
  return weights @ np.array(values), weights


def document(p, c, x):
  """One document [T, D] -> [T, D], and the blocks that each query and group chose."""
  count = len(x)
  of = lambda name: np.einsum('td,dgk->tgk', x, p[name])  # noqa: E731
  query = of('query')
  share = c.heads // c.kv_heads
  entries = []
  for begin in range(0, count - c.span + 1, c.stride):
    pair = []
    for kind in ('key', 'value'):
      part = of(f'compressed_{kind}')[begin : begin + c.span] + p[f'{kind}_places']
      hidden = np.einsum('sgk,skj->gj', part, p[f'{kind}_pool'])
      pair.append(hidden / (1 + np.exp(-hidden)) @ p[f'{kind}_pool_out'])
    entries.append((begin, turn(pair[0], begin), pair[1]))
  keys, values = of('selected_key'), of('selected_value')
  near_keys, near_values = of('window_key'), of('window_value')
  gates = 1 / (1 + np.exp(-np.einsum('td,dhc->thc', x, p['gate'])))
  out, chosen = np.zeros(x.shape), {}
  for t in range(count):
    seen = [e for e in entries if e[0] + c.span - 1 <= t]
    for g in range(c.kv_heads):
      worth = {}
      heads = range(g * share, (g + 1) * share)
      parts = {}
      for h in heads:
        q = turn(query[t, h], t)
        mixed, weights = softmax_mix(q, [e[1][g] for e in seen], [e[2][g] for e in seen])
        parts[h] = mixed
        for (begin, *_), w in zip(seen, weights):
          for token in range(begin, begin + c.span):
            worth[token // c.block] = worth.get(token // c.block, 0) + w / c.span
      own = t // c.block
      always = {b for b in range(own - c.local + 1, own + 1) if b >= 0}
      far = [b for b in range(own - c.local + 1) if b >= 0]
      far.sort(key=lambda b: (b >= c.initial, -worth.get(b, 0)))
      blocks = always | set(far[: c.blocks - c.local])
      chosen[t, g] = blocks
      tokens = [s for s in range(t + 1) if s // c.block in blocks]
      window = range(max(t - c.window + 1, 0), t + 1)
      for h in heads:
        q = turn(query[t, h], t)
        picked = softmax_mix(
          q, [turn(keys[s, g], s) for s in tokens], [values[s, g] for s in tokens]
        )
        near = softmax_mix(
          q, [turn(near_keys[s, g], s) for s in window], [near_values[s, g] for s in window]
        )
        three = (parts[h], picked[0], near[0])
        out[t] += sum(gates[t, h, i] * part for i, part in enumerate(three)) @ p['output'][h]
  return out, chosen


@pytest.mark.parametrize('lengths', [[(37,)], [(9, 21, 2), (1, 30, 5)]], ids=['one', 'packed'])
def test_against_its_twin(lengths):
  context = packed_context(lengths, 37)
  x = activations(len(lengths), 37)
  got = np.asarray(run(params(), x, context))
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params())
  for row, documents in enumerate(lengths):
    start = 0
    for size in documents:
      want, chosen = document(p, CONFIG, x[row, start : start + size].astype(np.float64))
      np.testing.assert_allclose(got[row, start : start + size], want, rtol=2e-4, atol=2e-4)
      if size > 25:
        # Some choice is not that of the first blocks: the ranking was at work.
        assert len({tuple(sorted(blocks)) for blocks in chosen.values()}) > size // CONFIG.block
      start += size
  assert np.isfinite(got).all()


@pytest.mark.parametrize('length', [7, 45, 129])
def test_all_blocks_are_dense_attention(length):
  # Where every block is chosen, the branch of selected blocks sees the whole past.
  many = NSA(**{**vars(CONFIG), 'blocks': 64, 'initial': 0})
  few = NSA(**{**vars(CONFIG), 'blocks': 64, 'local': 64, 'initial': 0})
  x, context = activations(1, length), packed_context([(length,)], length)
  loss = lambda p, x, c: jnp.sum(jnp.sin(run(p, x, context, c)))  # noqa: E731
  grads = [
    jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)(params(), x, c) for c in (many, few)
  ]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), *grads)


def test_gradient_reaches_every_weight():
  context = packed_context([(37,)], 37)
  grads = jax.grad(lambda p: jnp.sum(jnp.sin(run(p, activations(1, 37), context))))(params())
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    assert np.abs(leaf).max() > 1e-5, path


@pytest.mark.parametrize(
  'chunks', [(37,), (1,) * 37, (5, 1, 20, 4, 7)], ids=['once', 'ones', 'some']
)
def test_cache(chunks):
  """Tokens that come bit by bit give what they give together; rows may end in padding."""
  x = activations(2, 37, seed=3)
  context = packed_context([(37,), (30,)], 37)
  want = np.asarray(run(params(), x, context))
  cache = CONFIG.empty_cache(2, 41, jnp.float32)
  step = jax.jit(
    lambda x, context, cache: CONFIG.build().apply({'params': params()}, x, context, cache)
  )
  start, parts = 0, []
  for size in chunks:
    rows = slice(start, start + size)
    part = Context(*(a[:, rows] for a in (context.tokens, context.positions, context.segments)))
    y, cache = step(x[:, rows], part, cache)
    parts.append(np.asarray(y))
    start += size
  got = np.concatenate(parts, axis=1)
  np.testing.assert_allclose(got[0], want[0], rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(got[1, :30], want[1, :30], rtol=1e-3, atol=1e-3)


def test_chunks_of_queries(monkeypatch):
  """Long rows name their keys a chunk of queries at a time."""
  from deepseek_jax.layers.attention import nsa_blocks

  x, context = activations(2, 45), packed_context([(45,), (20, 11)], 45)
  own = {'params': params()}

  def both():
    loss = lambda x: jnp.sum(jnp.sin(CONFIG.build().apply(own, x, context)[0]))  # noqa: E731
    return jax.jit(jax.value_and_grad(loss))(x)

  whole = both()
  monkeypatch.setattr(nsa_blocks, 'CHUNK', 16)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), whole, both())


@pytest.mark.parametrize(
  ('fields', 'names'),
  [
    ({'heads': 0, 'kv_heads': 0, 'window': 0}, ['heads', 'kv_heads', 'window']),
    ({'heads': 6}, ['kv_heads']),
    ({'heads': 4, 'stride': 3}, ['stride', 'stride']),
    ({'heads': 4, 'blocks': 2}, ['blocks']),
    ({'heads': 4, 'head_dim': 5, 'initial': -1}, ['head_dim', 'initial']),
  ],
)
def test_wrong_fields(fields, names):
  with pytest.raises(ConfigError) as caught:
    NSA(**fields)
  assert [m.split('`')[1] for m in caught.value.messages] == names


def test_flops():
  # Three tokens: no entry, blocks and window are the past.
  c = NSA(heads=1, kv_heads=1, head_dim=2, value_dim=2, window=2)
  assert c.mixing_flops(3) == pytest.approx(2 * (2 + 2) * (2 + (1 + 2 + 2) / 3))


def test_weights_that_make_entries_are_met_seldom():
  """A span of 4 tokens every 2: each group's channels are multiplied twice over, in all."""
  cost = {name: met.share * met.products for name, met in CONFIG.met().items()}
  names = {name for name in params() if 'pool' in name or 'places' in name}
  assert cost.keys() == names
  assert {cost[name] for name in names if 'pool' in name} == {2 / 2}
  assert cost['key_places'] == cost['value_places'] == 0
