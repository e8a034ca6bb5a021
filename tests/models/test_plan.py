"""Grouping layers into scans, and moving weights between groupings."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.gated import Gated
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.window import Window
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.plan import Block, Segment, locate, segment, stack, unroll, unstack

MOE = MoE(experts=8, top_k=2, hidden=16)
A = Block(attention=Window(heads=2), feed_forward=MOE)
B = Block(attention=MLA(heads=2), feed_forward=MOE)
C = Block(attention=Gated(heads=2), feed_forward=MOE)
D = Block(attention=MLA(heads=2), feed_forward=SwiGLU(hidden=32))


def flat(segments):
  return [block for part in segments for block in part.pattern * part.repeats]


def test_v3():
  assert segment([D] * 3 + [B] * 58) == (Segment((D,), 3), Segment((B,), 58))


def test_v4_flash():
  layers = [A, A, B] + [C, D] * 20
  assert segment(layers) == (Segment((A,), 2), Segment((B,), 1), Segment((C, D), 20))


@pytest.mark.parametrize(
  ('layers', 'want'),
  [
    ([A], [((A,), 1)]),
    ([A, B], [((A,), 1), ((B,), 1)]),
    # A pattern that ends half-way.
    ([A, B] * 3 + [A], [((A,), 1), ((B, A), 3)]),
    # The first repeat of A belongs to no scan of its own.
    ([A, A, B, A, B], [((A,), 1), ((A, B), 2)]),
    ([A, A, B] * 4, [((A, A, B), 4)]),
    # Fewer blocks beat fewer segments.
    ([A] * 4 + [B] * 4, [((A,), 4), ((B,), 4)]),
  ],
)
def test_patterns(layers, want):
  assert segment(layers) == tuple(Segment(*part) for part in want)


def test_equal_layers_are_found_by_value():
  assert segment([B, dataclasses.replace(B)]) == (Segment((B,), 2),)


def groupings(layers):
  """Every way to cut layers into repeated patterns."""
  if not layers:
    yield ()
  for size in range(1, len(layers) + 1):
    for repeats in range(1, len(layers) // size + 1):
      if layers[: size * repeats] == layers[:size] * repeats and (size == 1 or repeats > 1):
        for rest in groupings(layers[size * repeats :]):
          yield (Segment(tuple(layers[:size]), repeats), *rest)


def test_best_of_all_groupings():
  cost = lambda parts: (sum(len(p.pattern) for p in parts), len(parts))  # noqa: E731
  for layers in itertools.product([A, B], repeat=6):
    got = segment(layers)
    assert flat(got) == list(layers)
    assert cost(got) == min(map(cost, groupings(list(layers))))


def test_longest_pattern_is_limited():
  layers = [A, B, C] * 3
  assert segment(layers, longest=3) == (Segment((A, B, C), 3),)
  assert segment(layers, longest=2) == tuple(Segment((block,), 1) for block in layers)


def test_no_layers():
  with pytest.raises(ConfigError, match='at least 1 layer'):
    segment([])


def test_unroll():
  plan = (Segment((A,), 3), Segment((B, C), 7))
  assert unroll(plan, 1) == plan
  assert unroll(plan, 3) == (
    Segment((A, A, A), 1),
    Segment((B, C) * 3, 2),
    Segment((B, C), 1),
  )
  for repeats in range(1, 10):
    assert flat(unroll(plan, repeats)) == flat(plan)
    assert sum(part.layers for part in unroll(plan, repeats)) == 17


PLANS = [
  (Segment((A,), 2), Segment((B,), 1), Segment((C, D), 3)),
  (Segment((A, A), 1), Segment((B,), 1), Segment((C, D, C, D), 1), Segment((C, D), 1)),
  tuple(Segment((block,), 1) for block in [A, A, B, C, D, C, D, C, D]),
]


def layer_variables(make):
  """Nine layers, A to D with weights of their own shapes; B is without variables."""
  shapes = {A: (2,), C: (3, 4), D: (5,)}
  blocks = flat(PLANS[0])
  return {
    str(i): {'w': make(i, shapes[b]), 'deep': {'v': make(i + 50, (1,))}}
    for i, b in enumerate(blocks)
    if b in shapes
  }


@pytest.mark.parametrize('plan', PLANS)
def test_stack_and_unstack(plan):
  layers = layer_variables(lambda i, shape: np.full(shape, i, np.float32))
  tree = stack(layers, plan)
  back = unstack(tree, plan)
  assert list(back) == ['0', '1', '3', '4', '5', '6', '7', '8']
  jax.tree.map(np.testing.assert_array_equal, back, layers)
  # JAX arrays go the same way.
  tree_on_device = stack(jax.tree.map(jnp.asarray, layers), plan)
  jax.tree.map(np.testing.assert_array_equal, tree_on_device, tree)
  jax.tree.map(np.testing.assert_array_equal, unstack(tree_on_device, plan), layers)


def test_where_a_stack_keeps_its_layers():
  layers = layer_variables(lambda i, shape: np.full(shape, i, np.float32))
  tree = stack(layers, PLANS[0])
  # B has no variables: neither has its segment.
  assert set(tree) == {'segment_0', 'segment_2'}
  assert set(tree['segment_2']) == {'block_0', 'block_1'}
  # Layers 3, 5, 7 share the first block of the last scan.
  assert tree['segment_2']['block_0']['w'].shape == (3, 3, 4)
  np.testing.assert_array_equal(tree['segment_2']['block_0']['w'][:, 0, 0], [3, 5, 7])
  np.testing.assert_array_equal(tree['segment_2']['block_1']['deep']['v'][:, 0], [54, 56, 58])


@pytest.mark.parametrize('plan', PLANS)
def test_abstract_shapes(plan):
  arrays = layer_variables(lambda i, shape: np.zeros(shape, np.float32))
  layers = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
  tree = stack(layers, plan)
  want = jax.tree.map(lambda x: (x.shape, x.dtype), stack(arrays, plan))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == want
  assert unstack(tree, plan) == layers


def test_a_scan_with_a_layer_missing():
  layers = layer_variables(lambda i, shape: np.zeros(shape, np.float32))
  del layers['5']
  with pytest.raises(ConfigError, match=r'layers \[3, 5, 7\] share a scan, but only 2'):
    stack(layers, PLANS[0])


@pytest.mark.parametrize('layers', [[D] * 2 + [B] * 3, [A, B] * 3 + [C], [A]])
def test_locate(layers):
  """Where an array is said to lie is where `stack` puts it."""
  segments = segment(layers)
  rows = {str(i): {'w': np.full((2, 3), i)} for i in range(len(layers))}
  grouped = stack(rows, segments)
  for i in range(len(layers)):
    home, repeat = locate(f'params/layers/{i}/w', segments)
    collection, top, scan, block, name = home.split('/')
    assert (collection, top, name) == ('params', 'stack', 'w')
    found = grouped[scan][block]['w']
    assert np.all((found if repeat is None else found[repeat]) == i)
    assert found.ndim == (2 if repeat is None else 3)
  assert locate('params/head/weight', segments) == ('params/head/weight', None)
  with pytest.raises(ConfigError, match=f'there are {len(layers)} layers'):
    locate(f'params/layers/{len(layers)}/w', segments)
