"""Attention to keys that travel is attention to keys that are here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from deepseek_jax.ops.attention.blocked import NONE, forward_part
from deepseek_jax.ops.attention.blocks import Static
from deepseek_jax.ops.attention.neighbours import attend_window, facts_before, tokens_before
from deepseek_jax.ops.attention.reference import Seen, attend_seen
from deepseek_jax.ops.attention.ring import (
  Facts,
  Keys,
  attend_around,
  attend_gathered,
  merge,
)
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh

AXES = ('seq',)
H, G, K, V, C = 4, 2, 6, 5, 7
SCALE = 0.4


def expand(source, weights):
  """Keys and values of G heads, made of C channels a token."""
  return tuple(jnp.einsum('bsc,cgk->bsgk', source, w) for w in weights)


def draw(batch, length):
  rng = np.random.default_rng(3)
  shapes = (batch, length, H, K), (batch, length, C), (C, G, K), (C, G, V), (batch, length, H, V)
  query, source, up_key, up_value, grad = (
    jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes
  )
  return query, source, (up_key, up_value), grad


def packed(batch, length):
  """Documents of odd lengths; the last row ends in padding."""
  rng = np.random.default_rng(5)
  segments, positions = np.zeros((2, batch, length), np.int32)
  for row in range(batch):
    cuts = np.sort(rng.choice(np.arange(1, length), 3, replace=False))
    ends = [0, *cuts, length - 3 if row == batch - 1 else length]
    for number in range(4):
      begin, end = ends[number], max(ends[number + 1], ends[number])
      segments[row, begin:end], positions[row, begin:end] = number + 1, np.arange(end - begin)
  return jnp.asarray(positions), jnp.asarray(segments)


def on_devices(attend, devices, *arrays):
  """Outputs and gradients of `attend(query, source, weights, positions, segments)`."""
  tokens = PartitionSpec(None, AXES)
  query, source, weights, grad, positions, segments = arrays

  def one(query, source, weights, positions, segments):
    seen = Seen(positions, positions, segments, segments)
    return attend(query, Keys(source, weights, expand), seen, scale=SCALE, axes=AXES)

  @jax.jit
  def both(query, source, weights):
    mapped = jax.shard_map(
      one,
      in_specs=(tokens, tokens, PartitionSpec(), tokens, tokens),
      out_specs=tokens,
      axis_names=set(AXES),
      check_vma=False,
    )
    out, pull = jax.vjp(
      lambda *arrays: mapped(*arrays, positions, segments), query, source, weights
    )
    return out, pull(grad)

  with jax.set_mesh(make_mesh(MeshConfig(seq=devices), jax.devices()[:devices])):
    return both(query, source, weights), both.lower(query, source, weights)


def at_home(query, source, weights, grad, positions, segments, window=None):
  """The same by the slow twin, on one device."""
  seen = Seen(positions, positions, segments, segments)

  def run(query, source, weights):
    out = attend_seen(query, *expand(source, weights), seen, scale=SCALE, window=window)
    return out * (segments > 0)[..., None, None]

  out, pull = jax.vjp(run, query, source, weights)
  return out, pull(grad)


def compare(attend, devices, length, window=None):
  query, source, weights, grad = draw(2, length)
  facts = packed(2, length)
  real = (facts[1] > 0)[..., None, None]
  found, lowered = on_devices(attend, devices, query, source, weights, grad * real, *facts)
  out, grads = found
  expected = at_home(query, source, weights, grad, *facts, window=window)
  pairs = zip(jax.tree.leaves((out * real, grads)), jax.tree.leaves(expected), strict=True)
  for a, b in pairs:
    np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())
  return lowered


@pytest.mark.parametrize('attend', [attend_around, attend_gathered])
@pytest.mark.parametrize(('devices', 'length'), [(1, 24), (2, 38), (4, 52)])
def test_values_and_gradients(attend, devices, length):
  """Documents end beside the edges of devices; one device has nobody to ask."""
  compare(attend, devices, length)


@pytest.mark.slow
@pytest.mark.parametrize('attend', [attend_around, attend_gathered])
def test_long_rows(attend):
  """Parts so long that the loop over blocks of keys runs."""
  compare(attend, 2, 2 * 300)


@pytest.mark.parametrize(
  ('devices', 'length', 'window'),
  [(4, 52, (5, 0)), (4, 52, (9, 3)), (4, 20, (30, 2)), (2, 26, (1, 1))],
)
def test_windows(devices, length, window):
  """Shorter and longer than a device's part, with first tokens of documents from far away."""
  compare(functools.partial(attend_window, window=window), devices, length, window)


def test_a_ring_gathers_nothing():
  """Keys go from device to device; no device has them all, forward or backward."""
  length = 64
  text = compare(attend_around, 4, length).compile().as_text()
  assert 'collective-permute' in text
  assert 'all-gather' not in text
  assert 'all-gather' in compare(attend_gathered, 4, length).compile().as_text()


def test_parts_are_merged():
  """Softmax over two sets of keys, and over a set that a query sees nothing of."""
  rng = np.random.default_rng(0)
  scores, values = rng.standard_normal((3, 8)), rng.standard_normal((8, V))

  def part(columns, seen=True):
    positions = jnp.zeros((1, 3), jnp.int32)
    there = jnp.zeros((1, len(scores[0][columns])), jnp.int32) - (not seen)
    key = jnp.asarray(scores[:, columns].T[None, :, None], jnp.float32)
    query = jnp.eye(3, dtype=jnp.float32)[None, :, None]
    value = jnp.asarray(values[columns][None, :, None], jnp.float32)
    return forward_part(query, key, value, NONE, Seen(positions, there), Static(1.0, None, False))

  first, second, hidden = part(slice(0, 3)), part(slice(3, 8)), part(slice(0, 8), seen=False)
  weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
  for order in ((first, second, hidden), (hidden, second, first)):
    out, log_sum = functools.reduce(merge, order)
    np.testing.assert_allclose(out[0, :, 0], weights @ values, rtol=1e-5)
    np.testing.assert_allclose(log_sum[0, :, 0], np.log(np.exp(scores).sum(axis=1)), rtol=1e-5)
  out, log_sum = merge(hidden, hidden)
  assert np.isfinite(log_sum).all()
  assert not out.any()


@pytest.mark.parametrize('count', [0, 1, 3, 4, 7, 13])
def test_tokens_before(count):
  """From one neighbour, from several, and from beyond the row's beginning."""
  x = jnp.arange(1, 17).reshape(1, 16)
  run = jax.shard_map(
    lambda x: (
      tokens_before(x, count, AXES),
      facts_before(Facts(x, x), count, AXES).segments,
    ),
    in_specs=PartitionSpec(None, AXES),
    out_specs=PartitionSpec(AXES),
    axis_names=set(AXES),
    check_vma=False,
  )
  with jax.set_mesh(make_mesh(MeshConfig(seq=4), jax.devices()[:4])):
    tokens, facts = jax.jit(run)(x)
  for device in range(4):
    places = np.arange(4 * device - count, 4 * device)
    np.testing.assert_array_equal(tokens[device], np.where(places < 0, 0, places + 1))
    np.testing.assert_array_equal(facts[device], np.where(places < 0, -1, places + 1))
