"""Orders in which devices hold the tokens of a row, and the work that each then has."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.layers.context import in_order, packed_context, shift_left
from deepseek_jax.layers.context_parallel import (
  Contiguous,
  Partitioned,
  Ring,
  ZigZag,
  arrange,
  count_pairs,
  imbalance,
  restore,
)
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from deepseek_jax.sharding.presets import CONTEXT

ORDERS = (Contiguous(), ZigZag())


@pytest.mark.parametrize('devices', [1, 2, 4])
@pytest.mark.parametrize('axis', [1, 2])
def test_orders(devices, axis):
  """Device i holds chunks i and 2 · P - 1 - i; and back."""
  row = np.arange(16)
  x = np.broadcast_to(row, (3, 16)) if axis == 1 else np.broadcast_to(row, (3, 2, 16))
  chunks = np.split(row, 2 * devices)
  expected = [np.concatenate([chunks[i], chunks[-1 - i]]) for i in range(devices)]
  held = arrange(x, ZigZag(), devices, axis)
  np.testing.assert_array_equal(held.reshape(-1, 16)[0], np.concatenate(expected))
  assert arrange(x, Contiguous(), devices, axis) is x
  for order in ORDERS:
    np.testing.assert_array_equal(
      restore(arrange(x, order, devices, axis), order, devices, axis), x
    )


def visible_pairs(positions, segments, holders, devices):
  """Every pair, one by one."""
  pairs = np.zeros((devices, devices), int)
  for row in range(len(positions)):
    for t in range(positions.shape[1]):
      for s in range(t + 1):
        if segments[row, s] == segments[row, t] > 0:
          pairs[holders[t], holders[s]] += 1
  return pairs


@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('devices', [2, 4])
def test_pairs_are_counted(order, devices):
  """Of packed rows with padding."""
  context = packed_context([[5, 11, 7], [24], [1, 2, 20]], 24)
  positions, segments = np.asarray(context.positions), np.asarray(context.segments)
  held = arrange(np.arange(24)[None], order, devices)[0]
  holders = np.argsort(held) // (24 // devices)
  found = count_pairs(positions, segments, order, devices)
  np.testing.assert_array_equal(found, visible_pairs(positions, segments, holders, devices))


def test_zigzag_is_even():
  """One document: the same work for every device, in every step of a ring; else it is 2 - 1 / P."""
  context = packed_context([[64]])
  facts = np.asarray(context.positions), np.asarray(context.segments)
  even = imbalance(count_pairs(*facts, ZigZag(), 8))
  assert even == pytest.approx((1, 1), abs=0.1)
  uneven = imbalance(count_pairs(*facts, Contiguous(), 8))
  assert uneven == pytest.approx((2 - 1 / 8,) * 2, abs=0.1)


def test_what_is_ahead():
  """Tokens of the row, though they lie on other devices."""
  mesh = make_mesh(MeshConfig(seq=2), jax.devices()[:2])
  x = jnp.arange(1, 9)[None]
  facts = {'rules': CONTEXT, 'parallel': Ring(order=ZigZag())}
  with jax.set_mesh(mesh):
    held = arrange(x, ZigZag(), 2)
    ahead = in_order(shift_left, held, 1, **facts)
    context = packed_context([[8]])
    context = dataclasses.replace(context, tokens=held, **facts)
    np.testing.assert_array_equal(context.tokens_ahead(1), ahead)
    np.testing.assert_array_equal(held[0, context.places(np.array([0, 3, 7]))], [1, 4, 8])
    assert context.sequence_axes == ('seq',)
    assert dataclasses.replace(context, parallel=Partitioned()).sequence_axes == ()
    assert dataclasses.replace(context, tokens=x[:, :1]).sequence_axes == ()
  np.testing.assert_array_equal(restore(ahead, ZigZag(), 2), [[2, 3, 4, 5, 6, 7, 8, 0]])
  assert context.sequence_axes == ()
