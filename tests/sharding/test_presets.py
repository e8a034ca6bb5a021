"""Every preset lays out every array of every tiny config, on several meshes."""

import dataclasses

import flax.linen as nn
import jax
import pytest

from configs import tiny_dsa, tiny_gated, tiny_mla, tiny_window
from deepseek_jax.core.tree import flatten
from deepseek_jax.models.decoder import init_variables
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from deepseek_jax.sharding.presets import CONTEXT, EXPERT, FSDP, TENSOR
from deepseek_jax.sharding.rules import (
  check_divisible,
  logical_axes,
  shard_count,
  tree_shardings,
  tree_specs,
)
from deepseek_jax.train.step import build_program

CONFIGS = {'mla': tiny_mla, 'window': tiny_window, 'gated': tiny_gated, 'dsa': tiny_dsa}
PRESETS = {'fsdp': FSDP, 'tensor': TENSOR, 'expert': EXPERT, 'context': CONTEXT}
MESHES = {
  'data': MeshConfig(),
  'model': MeshConfig(data=2, model=4),
  'expert': MeshConfig(data=2, expert=4),
  'replica': MeshConfig(replica=2, data=2, model=2),
  'four': MeshConfig(seq=2, expert=2, model=2),
  'seq': MeshConfig(data=2, seq=4),
}


@pytest.mark.parametrize('config', CONFIGS)
def test_every_preset_on_every_mesh(config):
  """No preset has a fault anywhere, and every array is cut as often as its axes say."""
  decoder = CONFIGS[config].get_config().model.build()
  boxed = jax.eval_shape(lambda key: init_variables(decoder, key), jax.random.key(0))
  axes, shapes = logical_axes(boxed), nn.meta.unbox(boxed)
  flat_axes, flat_shapes = flatten(axes), flatten(shapes)
  assert flat_axes.keys() == flat_shapes.keys()
  for rules in PRESETS.values():
    specs = tree_specs(rules, axes)
    for mesh_config in MESHES.values():
      sizes = mesh_config.sizes(8)
      assert check_divisible(shapes, specs, sizes) == []
      shardings = flatten(tree_shardings(make_mesh(mesh_config), specs))
      for address, shape in flat_shapes.items():
        expected = tuple(
          size // (1 if name is None else shard_count(getattr(rules, name) or None, sizes))
          for size, name in zip(shape.shape, flat_axes[address], strict=True)
        )
        assert shardings[address].shard_shape(shape.shape) == expected, address


def pieces(leaf):
  """How many different pieces an array is cut in."""
  shape = leaf.sharding.shard_shape(leaf.shape)
  total = 1
  for whole, part in zip(leaf.shape, shape, strict=True):
    assert whole % part == 0
    total *= whole // part
  return total


@pytest.mark.parametrize(
  ('preset', 'mesh'), [('fsdp', 'data'), ('tensor', 'model'), ('expert', 'expert')]
)
def test_the_state_of_a_run(preset, mesh):
  """A dense and an expert matrix, the moments of Adam and the batch, in pieces counted by hand."""
  rules, mesh_config = PRESETS[preset], MESHES[mesh]
  program = build_program(dataclasses.replace(tiny_mla.get_config(), rules=rules, mesh=mesh_config))
  state = program.abstract_state
  blocks = state.params['stack']
  assert (
    pieces(blocks['segment_0']['block_0']['feed_forward']['gate'])
    == {'fsdp': 8, 'tensor': 8, 'expert': 2}[preset]
  )
  assert pieces(blocks['segment_1']['block_0']['feed_forward']['gate']) == 8
  moments = [
    jax.tree.map(lambda leaf: leaf.sharding, node)
    for node in jax.tree.leaves(
      state.opt_state, is_leaf=lambda node: isinstance(node, dict) and 'stack' in node
    )
    if isinstance(node, dict)
  ]
  expected = jax.tree.map(lambda leaf: leaf.sharding, state.params)
  assert moments == [expected, expected]
  rows = {'fsdp': 1, 'tensor': 4, 'expert': 1}[preset]
  assert program.batch_sharding.shard_shape((8, 64)) == (rows, 64)
