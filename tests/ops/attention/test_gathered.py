"""Attention to chosen keys against float64 loops and dense attention, with gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops.attention import gathered
from deepseek_jax.ops.attention.gathered import KeySets, attend_blocks, attend_selected
from deepseek_jax.ops.attention.reference import Seen, attend_seen, visible

B, H, K, V = 2, 4, 6, 3
SCALE = 0.6


FORMS = {'latent': (1, True), 'shared': (1, False), 'grouped': (2, False), 'heads': (4, False)}


def draw(form, length, seed=0):
  """Query, key, value, bias, sinks and the gradient of the result."""
  groups, latent = FORMS[form]
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  key = normal(B, length, groups, K)
  value = key[..., :V] if latent else normal(B, length, groups, V)
  return normal(B, length, H, K), key, value, normal(B, length), normal(H), normal(B, length, H, V)


def oracle(query, key, value, bias, sinks, allowed):
  """Returns [B, T, H, V] and the weights summed over heads; `allowed(b, t)` lists keys."""
  query, key, value, bias, sinks = (
    np.asarray(x, np.float64) for x in (query, key, value, bias, sinks)
  )
  out, mass = np.zeros((*query.shape[:3], value.shape[-1])), np.zeros((B, *2 * [query.shape[1]]))
  for b, t, h in np.ndindex(query.shape[:3]):
    group = h // (query.shape[2] // key.shape[2])
    keys = allowed(b, t)
    scores = [query[b, t, h] @ key[b, s, group] * SCALE + bias[b, s] for s in keys]
    weights = np.exp(scores) / (np.sum(np.exp(scores)) + np.exp(sinks[h]))
    for weight, s in zip(weights, keys):
      out[b, t, h] += weight * value[b, s, group]
      mass[b, t, s] += weight
  return out, mass


def choose(length, count, rng):
  """Different causal keys of each query [B, T, count], in any order, with holes; a row has none."""
  indices = np.full((B, length, count), -1, np.int32)
  for b, t in np.ndindex(B, length):
    keys = rng.permutation(t + 1)[: min(count, t + 1) - (t > 3)]
    places = rng.permutation(count)[: len(keys)]
    indices[b, t, places] = keys
  indices[1, -1] = -1
  return indices


def packed(length):
  """Two documents and padding; one document."""
  positions = np.tile(np.arange(length, dtype=np.int32), (B, 1))
  segments = np.ones((B, length), np.int32)
  cut, end = length // 3, length - 2
  positions[0, cut:] -= cut
  segments[0, cut:], segments[0, end:] = 2, 0
  return Seen(positions, positions, segments, segments)


def both_ways(function, dense, arguments, grad):
  """Results and gradients of two functions of the same arguments."""
  found = []
  for run in (function, dense):
    out, pull = jax.vjp(run, *arguments)
    found.append((out, *pull(grad)))
  return found


@pytest.mark.parametrize(
  ('form', 'length', 'count'), [('latent', 7, 3), ('shared', 1, 2), ('grouped', 13, 4)]
)
def test_selected_is_what_loops_say(form, length, count):
  query, key, value, bias, sinks, _ = draw(form, length)
  indices = choose(length, count, np.random.default_rng(1))

  def allowed(b, t):
    return [s for s in indices[b, t] if s >= 0]

  want, weights = oracle(query, key, value, bias, sinks, allowed)
  given = V if FORMS[form][1] else value
  got = attend_selected(
    query, key, given, indices, scale=SCALE, key_bias=bias, sinks=sinks, mass=True
  )
  np.testing.assert_allclose(got.out, want, rtol=1e-5, atol=1e-6)
  assert not np.any(got.out[1, -1])
  for b, t, place in np.ndindex(indices.shape):
    s = indices[b, t, place]
    assert got.mass[b, t, place] == pytest.approx(weights[b, t, s] if s >= 0 else 0, abs=1e-5)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize(('length', 'block', 'rows'), [(45, 8, 100)])
def test_all_keys_give_dense_attention(form, length, block, rows, monkeypatch):
  monkeypatch.setattr(gathered, 'ROWS', rows)
  query, key, value, bias, sinks, grad = draw(form, length)
  seen = packed(length)
  every = np.broadcast_to(np.arange(length, dtype=np.int32), (B, length, length))
  latent = FORMS[form][1]

  def dense(query, key, value, bias, sinks):
    value = key[..., :V] if latent else value
    return attend_seen(query, key, value, seen, scale=SCALE, key_bias=bias, sinks=sinks)

  def selected(query, key, value, bias, sinks):
    indices = jnp.where(visible(*seen), every, -1)
    options = {'scale': SCALE, 'key_bias': bias, 'sinks': sinks}
    return attend_selected(query, key, V if latent else value, indices, **options).out

  def blocks(query, key, value, bias, sinks):
    sets = jnp.asarray(every[:, : -(-length // block)])
    options = {'scale': SCALE, 'key_bias': bias, 'sinks': sinks}
    return attend_blocks(
      query, key, V if latent else value, KeySets(sets, block, seen), **options
    ).out

  for function in (selected, blocks):
    got, want = both_ways(jax.jit(function), jax.jit(dense), (query, key, value, bias, sinks), grad)
    for a, b in zip(got, want):
      assert latent or np.max(np.abs(b)) > 1e-3
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize('form', ['latent', 'heads'])
def test_blocks_that_share_some_keys(form):
  length, block = 37, 5
  query, key, value, bias, sinks, grad = draw(form, length)
  seen = packed(length)
  rng = np.random.default_rng(3)
  sets = np.stack(
    [[rng.permutation(length)[:9] for _ in range(-(-length // block))] for _ in range(B)]
  ).astype(np.int32)
  sets[:, :, 4] = -1
  member = np.zeros((B, length, length), bool)
  for b, t, place in np.ndindex(B, length, 9):
    if (s := sets[b, t // block, place]) >= 0:
      member[b, t, s] = True
  mask = jnp.asarray(member) & visible(*seen)
  latent = FORMS[form][1]

  def dense(query, key, value, bias, sinks):
    value = key[..., :V] if latent else value
    key, value = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum('bthk,bshk->bhts', query, key) * SCALE + bias[:, None, None]
    scores = jnp.where(mask[:, None], scores, -1e30)
    sink = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum('bhts,bshv->bthv', weights, value)

  def blocks(query, key, value, bias, sinks):
    options = {'scale': SCALE, 'key_bias': bias, 'sinks': sinks}
    return attend_blocks(
      query, key, V if latent else value, KeySets(sets, block, seen), **options
    ).out

  got, want = both_ways(jax.jit(blocks), jax.jit(dense), (query, key, value, bias, sinks), grad)
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_nothing_as_large_as_all_pairs_is_held():
  length = 4096
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  query, key = shape((1, length, 2, 8)), shape((1, length, 8))
  sets = jax.ShapeDtypeStruct((1, length // 64, 32), jnp.int32)
  places = jax.ShapeDtypeStruct((1, length), jnp.int32)

  def total(query, key, sets, places):
    shared = KeySets(sets, 64, Seen(places, places))
    return jnp.sum(attend_blocks(query, key, 8, shared, scale=1.0).out)

  compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(query, key, sets, places).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < length * length


def test_bfloat16_stays():
  query, key, _, _, _, _ = draw('latent', 7)
  indices = choose(7, 3, np.random.default_rng(1))
  exact = attend_selected(query, key, V, indices, scale=SCALE).out
  half = attend_selected(
    jnp.asarray(query, jnp.bfloat16), jnp.asarray(key, jnp.bfloat16), V, indices, scale=SCALE
  ).out
  assert half.dtype == jnp.bfloat16
  assert np.max(np.abs(np.asarray(half, np.float32) - exact)) < 0.05 * np.max(np.abs(exact))
