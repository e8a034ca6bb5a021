"""DSA against its float64 twin, against MLA, and what its indexer learns."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.indexer import Indexer
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.sparse import DSA, Shared, Sparse, WarmUp
from deepseek_jax.layers.attention.stored import Hadamard, Stored
from deepseek_jax.layers.attention.top_k import TopK
from deepseek_jax.layers.context import text_context

INDEXER = Indexer(heads=3, dim=6)
ROTATED = Stored(key=None, index=None, rotation=Hadamard())


def halves(x, position, frequencies):
  """Rotates channels (k, k + n / 2) of x [n]."""
  a, b = np.split(x, 2)
  cos, sin = np.cos(position * frequencies), np.sin(position * frequencies)
  return np.concatenate([a * cos - b * sin, a * sin + b * cos])


def scores_of(params, config, x, positions):
  """The indexer's scores [B, T, T] in float64, one pair at a time."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  i, c = p['indexer'], config.indexer
  x = np.asarray(x, np.float64)
  source = x
  if config.query_latent is not None:
    source = x @ p['query_down']
    source /= np.sqrt(np.mean(source**2, axis=-1, keepdims=True) + 1e-6)
    source *= p['query_norm']['scale']
  frequencies = config.rope.frequencies(config.rope_dim).astype(np.float64)
  key = x @ i['key']
  key -= key.mean(axis=-1, keepdims=True)
  key = key / np.sqrt(np.mean(key**2, axis=-1, keepdims=True) + 1e-6) * i['key_scale']
  key += i['key_bias']
  query = (source @ i['query']).reshape(*x.shape[:2], c.heads, c.dim)
  weights = x @ i['weights'] * c.heads**-0.5 * c.dim**-0.5
  size, found = config.rope_dim, np.zeros((*x.shape[:2], x.shape[1]))
  for b, t in np.ndindex(x.shape[:2]):
    key[b, t, :size] = halves(key[b, t, :size], positions[b, t], frequencies)
    for j in range(c.heads):
      query[b, t, j, :size] = halves(query[b, t, j, :size], positions[b, t], frequencies)
  for b, t, s in np.ndindex(found.shape):
    for j in range(c.heads):
      found[b, t, s] += weights[b, t, j] * max(query[b, t, j] @ key[b, s], 0)
  return found


def past_of(positions, segments, b, t, before):
  """Keys of a query's document at positions below `before`."""
  same = [s for s in range(len(positions[b])) if segments[b, s] == segments[b, t]]
  return [s for s in same if positions[b, s] < before]


def keys_of(config, scores, positions, segments, b, t):
  """The keys of a query, by the definition."""
  first, before = t, positions[b, t] + 1
  if isinstance(config.sharing, Shared):
    first = t // config.sharing.block * config.sharing.block
    before = positions[b, first] - config.sharing.window
  past = past_of(positions, segments, b, first, before)
  best = sorted(past, key=lambda s: (-scores[b, first, s], s))[: config.top_k]
  near = []
  if isinstance(config.sharing, Shared):
    near = range(max(first - config.sharing.window, 0), t + 1)
  return {s for s in [*best, *near] if segments[b, s] == segments[b, t] and s <= t}


@pytest.mark.parametrize(
  ('top_k', 'sharing', 'query_latent'),
  [(3, None, 5), (1, None, None), (2, Shared(block=3, window=1), None), (1, Shared(block=2), 5)],
)
def test_dsa(top_k, sharing, query_latent, sizes, packed, build, oracle):
  more = {} if sharing is None else {'sharing': sharing}
  config = DSA(**sizes, top_k=top_k, indexer=INDEXER, query_latent=query_latent, **more)
  params, run = build(config)
  x, context = packed
  segments, positions = context.segments, context.positions
  scores = scores_of(params, config, x, positions)

  def allowed(b, t, s):
    return s in keys_of(config, scores, positions, segments, b, t)

  want = oracle(params, config, x, positions, allowed)
  real = segments > 0
  got = np.asarray(run(params, x, context))
  np.testing.assert_allclose(got[real], want[real], rtol=1e-4, atol=1e-5)
  assert np.all(np.isfinite(got))


@pytest.mark.parametrize(
  'config',
  [
    lambda sizes: DSA(**sizes, top_k=9, indexer=INDEXER),
    lambda sizes: DSA(**sizes, top_k=2048, indexer=Indexer(heads=2, dim=8), stored=ROTATED),
    lambda sizes: DSA(**sizes, indexer=INDEXER, stage=WarmUp()),
    lambda sizes: DSA(**sizes, indexer=INDEXER, sharing=Shared(block=4, window=0)),
    lambda sizes: TopK(**sizes, top_k=40),
  ],
)
def test_all_keys_give_mla_with_its_gradients(config, sizes, packed, build):
  config = config(sizes)
  params, run = build(config)
  x, context = packed
  plain = {name: p for name, p in params.items() if name != 'indexer'}
  module = MLA(**sizes).build()
  real = jnp.asarray(context.segments > 0, jnp.float32)[..., None]

  def total(function):
    return jax.jit(jax.grad(lambda p, x: jnp.sum(jnp.sin(function(p, x)) * real), argnums=(0, 1)))

  got, got_x = total(lambda p, x: run(p, x, context))(params, x)
  want, want_x = total(lambda p, x: module.apply({'params': p}, x, context)[0])(plain, x)
  # Nothing that the text says reaches the indexer.
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(got.pop('indexer', {})))
  for a, b in zip(jax.tree.leaves((got, got_x)), jax.tree.leaves((want, want_x))):
    assert np.max(np.abs(b)) > 1e-3
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def reported(config, params, x, context):
  """The loss of the indexer with its gradients, and what is observed."""

  def loss(params):
    found = config.build().apply({'params': params}, x, context, mutable=['losses', 'observed'])
    return found[1]['losses']['indexer'], found[1]['observed']['indexer']

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.mark.parametrize(
  ('stage', 'sharing'), [('warm', None), ('sparse', None), ('sparse', Shared(block=3, window=1))]
)
def test_the_indexer_follows_attention(stage, sharing, sizes, packed, build):
  stage = WarmUp(weight=0.5) if stage == 'warm' else Sparse(weight=0.5)
  more = {} if sharing is None else {'sharing': sharing}
  config = DSA(**sizes, top_k=3, indexer=INDEXER, stage=stage, **more)
  params, _ = build(config)
  x, context = packed
  segments, positions = context.segments, context.positions
  (loss, observed), grad = reported(config, params, x, context)
  scores = scores_of(params, config, x, positions)
  logits = logits_of(params, config, x, positions, segments)
  expected, gaps = 0.0, []
  facts = {'recall': 0.0, 'coverage': 0.0}
  for b in range(2):
    row = []
    for t in np.flatnonzero(segments[b] > 0):
      past = past_of(positions, segments, b, t, positions[b, t] + 1)
      chosen = keys_of(config, scores, positions, segments, b, t)
      keys = past if isinstance(stage, WarmUp) else sorted(chosen)
      p = summed(logits[b, t], keys) / config.heads
      dense = dict(zip(past, summed(logits[b, t], past)))
      q = np.exp(scores[b, t, keys]) / np.exp(scores[b, t, keys]).sum()
      row.append(np.sum(p * np.log(p / q)))
      best = sorted(past, key=lambda s: -dense[s])[: len(chosen)]
      facts['recall'] += len(chosen & set(best)) / len(chosen)
      facts['coverage'] += sum(dense[s] for s in chosen) / config.heads
    gaps += row
    expected += 0.5 * np.mean(row)
  assert float(loss) == pytest.approx(expected, rel=1e-4)
  assert float(observed['queries']) == np.sum(segments > 0)
  assert float(observed['divergence']) == pytest.approx(sum(gaps), rel=1e-4)
  for name, value in facts.items():
    assert float(observed[name]) == pytest.approx(value, rel=1e-4), name
  # The loss teaches the indexer, and nothing else.
  for name, part in grad.items():
    moved = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(part))
    assert (moved > 1e-5) == (name == 'indexer'), name
  norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grad['indexer'])))
  step = jax.tree.map(lambda p, g: p - 1e-3 / norm * g, params, grad)
  if isinstance(stage, WarmUp):
    (lower, _), _ = reported(config, step, x, context)
    assert float(loss - lower) == pytest.approx(1e-3 * norm, rel=5e-2)


def summed(logits, keys):
  """Attention of one query to some keys and no others, summed over heads; logits [H, T]."""
  weights = np.exp(logits[:, keys])
  return np.sum(weights / weights.sum(axis=1, keepdims=True), axis=0)


def logits_of(params, config, x, positions, segments):
  """Scores of dense attention [B, T, H, T] in float64."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x = np.asarray(x, np.float64)
  frequencies = config.rope.frequencies(config.rope_dim).astype(np.float64)
  both = x @ p['latent_down']
  latent = both[..., : config.latent]
  latent /= np.sqrt(np.mean(latent**2, axis=-1, keepdims=True) + 1e-6)
  latent *= p['latent_norm']['scale']
  query = np.einsum('btd,dhk->bthk', x, p['query'])
  key = np.einsum('btc,chk->bthk', latent, p['key_value_up'])[..., : config.nope_dim]

  def turn(y, position):
    z = (y[0::2] + 1j * y[1::2]) * np.exp(1j * position * frequencies)
    return np.stack([z.real, z.imag], axis=-1).reshape(y.shape)

  found = np.zeros((*x.shape[:2], config.heads, x.shape[1]))
  for b, t, h in np.ndindex(*x.shape[:2], config.heads):
    past = past_of(positions, segments, b, t, positions[b, t] + 1)
    q, rope = query[b, t, h, : config.nope_dim], query[b, t, h, config.nope_dim :]
    scores = [
      q @ key[b, s, h]
      + turn(rope, positions[b, t]) @ turn(both[b, s, config.latent :], positions[b, s])
      for s in past
    ]
    found[b, t, h, past] = np.array(scores) * config.softmax_scale
  return found


def test_flops():
  config = DSA(heads=3, nope_dim=4, rope_dim=2, value_dim=5, latent=7, top_k=4, indexer=INDEXER)
  pairs = sum(min(t + 1, 4) for t in range(9)) / 9
  index = 2 * 3 * 6 * 5
  assert config.mixing_flops(9) == pytest.approx(2 * 3 * (2 * 7 + 2) * pairs + index)
  warm = dataclasses.replace(config, stage=WarmUp())
  assert warm.mixing_flops(9) == pytest.approx(2 * 3 * (6 + 5) * 5 + index)
  shared = dataclasses.replace(config, top_k=2, sharing=Shared(block=3, window=1))
  x = np.zeros((1, 9, 9))
  places, ones = np.arange(9)[None], np.ones((1, 9))
  want = np.mean([len(keys_of(shared, x, places, ones, 0, t)) for t in range(9)])
  assert shared.visible_tokens(9) == pytest.approx(want)


def test_top_k_takes_the_highest_mean_score(sizes, packed, build, oracle):
  config = TopK(**sizes, top_k=3)
  params, run = build(config)
  x, context = packed
  segments, positions = context.segments, context.positions
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  # The mean of the heads' scores is the score of one head whose query and key lie side by side.
  frequencies = config.rope.frequencies(config.rope_dim).astype(np.float64)
  both = x.astype(np.float64) @ p['latent_down']
  latent = both[..., : config.latent]
  latent = latent / np.sqrt(np.mean(latent**2, axis=-1, keepdims=True) + 1e-6)
  latent *= p['latent_norm']['scale']
  query = np.einsum('btd,dhk->bthk', x.astype(np.float64), p['query'])
  key = np.einsum('btc,chk->bthk', latent, p['key_value_up'])

  def turn(y, position):
    z = (y[0::2] + 1j * y[1::2]) * np.exp(1j * position * frequencies)
    return np.stack([z.real, z.imag], axis=-1).reshape(y.shape)

  def score(b, t, s):
    n = config.nope_dim
    k_rope = turn(both[b, s, config.latent :], positions[b, s])
    return sum(
      query[b, t, h, :n] @ key[b, s, h, :n] + turn(query[b, t, h, n:], positions[b, t]) @ k_rope
      for h in range(config.heads)
    )

  def allowed(b, t, s):
    past = past_of(positions, segments, b, t, positions[b, t] + 1)
    return s in sorted(past, key=lambda s: -score(b, t, s))[:3]

  want = oracle(params, config, x, positions, allowed)
  real = segments > 0
  got = np.asarray(run(params, x, context))
  np.testing.assert_allclose(got[real], want[real], rtol=1e-4, atol=1e-5)


def test_wrong_fields():
  with pytest.raises(ConfigError) as caught:
    DSA(heads=1, rope_dim=8, top_k=0, indexer=Indexer(dim=6))
  assert len(caught.value.messages) == 2
  with pytest.raises(ConfigError, match='power of two'):
    DSA(heads=1, rope_dim=4, indexer=Indexer(dim=6), stored=ROTATED)
  with pytest.raises(ConfigError) as caught:
    Indexer(heads=0, dim=0)
  assert len(caught.value.messages) == 2
  with pytest.raises(ConfigError) as caught:
    Shared(block=0, window=-1)
  assert len(caught.value.messages) == 2
  for stage in (WarmUp, Sparse):
    with pytest.raises(ConfigError, match='weight'):
      stage(weight=0.0)
  with pytest.raises(ConfigError, match='top_k'):
    TopK(heads=1, top_k=0)


def test_weights_are_those_of_mla_and_the_indexer(sizes):
  def shapes(config):
    x = jax.ShapeDtypeStruct((1, 2, 7), jnp.float32)
    ids = jnp.zeros((1, 2), jnp.int32)
    made = jax.eval_shape(config.build().init, jax.random.key(0), x, text_context(ids))
    return jax.tree.map(lambda leaf: leaf.shape, nn.meta.unbox(made['params']))

  mla = shapes(MLA(**sizes))
  for stage in (WarmUp(), Sparse()):
    found = shapes(DSA(**sizes, indexer=INDEXER, stage=stage))
    assert found.pop('indexer').keys() == {'query', 'key', 'key_scale', 'key_bias', 'weights'}
    assert found == mla
  assert shapes(TopK(**sizes)) == mla
