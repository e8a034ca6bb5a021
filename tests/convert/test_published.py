"""Tensors of published folders as plain numbers: FP8 tiles, FP4 blocks, experts in one tensor."""

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest

from configs import tiny_mla, tiny_v4
from deepseek_jax.convert import load
from deepseek_jax.convert.lazy import stored
from deepseek_jax.convert.load import prepare
from deepseek_jax.convert.names import as_in_transformers, names_of
from deepseek_jax.convert.published import dequantised, open_published, unpacked
from deepseek_jax.convert.safetensors import write_folder
from deepseek_jax.core.config import ConfigError
from deepseek_jax.formats import float4, float8
from deepseek_jax.models.decoder import init_variables, plan_segments
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from deepseek_jax.sharding.presets import EXPERT
from deepseek_jax.sharding.rules import logical_axes, tree_shardings, tree_specs
from tests.convert.test_names import shapes_of

RNG = np.random.default_rng(0)


def random(*shape):
  return RNG.standard_normal(shape).astype(np.float32)


def published(model):
  """Random arrays of a model by address, and as tensors under the hub's names."""
  ours = {
    address: random(*leaf.shape).astype(leaf.dtype) for address, leaf in shapes_of(model).items()
  }
  tensors = {}
  for entry in names_of(model).entries:
    parts = entry.form.theirs(stored(ours[entry.ours]))
    tensors |= zip(entry.theirs, (np.array(part.whole()) for part in parts), strict=True)
  return ours, tensors


def lazies(tensors):
  return {name: stored(x) for name, x in tensors.items()}


@pytest.mark.parametrize('scale', ['float32', 'power'])
@pytest.mark.parametrize('shape', [(7, 37), (16, 8), (45, 129)])
def test_tiles_of_eight_bits(shape, scale, tmp_path):
  """Under either name of the scales, with tiles that are cut off."""
  tile = (8, 16)
  x = random(*shape)
  encoded = float8.encode(x, tile, scale)
  want = float8.decode(encoded, tile)
  name = {'power': 'a.scale', 'float32': 'a.weight_scale_inv'}[scale]
  files = lazies({'a.weight': np.asarray(encoded.values), name: np.asarray(encoded.scales)})
  list(write_folder(tmp_path, files | lazies({'b.weight': x})))
  found = open_published(tmp_path, {'quantization_config': {'weight_block_size': list(tile)}})
  assert found.keys() == {'a.weight', 'b.weight'}
  np.testing.assert_array_equal(found['a.weight'].whole(), want)
  np.testing.assert_array_equal(found['b.weight'].whole(), x)
  assert abs(want - x).max() < 0.1 * abs(x).max()


def test_blocks_of_four_bits(tmp_path):
  """Two numbers a byte, stored as signed bytes."""
  x = random(7, 96)
  encoded = float4.encode(x)
  values, scales = np.asarray(encoded.values), np.asarray(encoded.scales)
  tensors = {'e.weight': values.view(np.int8), 'e.scale': scales}
  list(write_folder(tmp_path, lazies(tensors)))
  found = open_published(tmp_path, {})
  np.testing.assert_array_equal(found['e.weight'].whole(), float4.decode(encoded))


def test_scales_that_are_missing_or_do_not_fit():
  """Every one is told."""
  eight = random(9, 9).astype(ml_dtypes.float8_e4m3fn)
  ones = np.ones((1, 1), np.float32)
  tensors = {
    'a.weight': eight,
    'b.weight': eight,
    'b.weight_scale_inv': np.ones((2, 1), np.float32),
    'c.weight': random(3, 3),
    'c.weight_scale_inv': ones,
    'hc_attn_scale': random(3),
  }
  with pytest.raises(ConfigError) as caught:
    dequantised(lazies(tensors))
  alone, misfit, plain = caught.value.messages
  assert alone == 'a.weight: is float8_e4m3fn and has no scales'
  assert misfit == 'b.weight_scale_inv: scales [2, 1]: expected [1, 1]'
  assert plain.startswith('c.weight: has scales, and is float32; expected float8')


@pytest.mark.parametrize('spelling', ['hub', 'transformers', 'packed'])
@pytest.mark.parametrize('config', [tiny_mla, tiny_v4])
def test_every_spelling(config, spelling):
  """The hub's names, those of transformers, and all experts of a layer in one tensor."""
  model = config.get_config().model
  ours, tensors = published(model)
  if spelling != 'hub' and config is tiny_v4:
    entries = names_of(model).entries
    renamed = {
      old: new
      for entry, other in zip(entries, as_in_transformers(entries), strict=True)
      for old, new in zip(entry.theirs, other.theirs, strict=True)
    }
    tensors = {renamed[name]: x for name, x in tensors.items()}
  if spelling == 'packed':
    tensors = packed(tensors)
  found = prepare(model, unpacked(lazies(tensors)), shapes_of(model)).parts
  assert found.keys() == ours.keys()
  for address, x in ours.items():
    np.testing.assert_array_equal(found[address].whole(), x, err_msg=address)


def packed(tensors):
  """Gate and up of all experts in one tensor [E, 2F, D], down in another [E, D, F]."""
  result = {name: x for name, x in tensors.items() if '.experts.' not in name}
  for prefix in dict.fromkeys(n.split('.experts.')[0] for n in tensors if '.experts.' in n):
    count = len({n.split('.')[-3] for n in tensors if n.startswith(f'{prefix}.experts.')})

    def each(part, prefix=prefix, count=count):
      return np.stack([tensors[f'{prefix}.experts.{e}.{part}.weight'] for e in range(count)])

    both = np.concatenate([each('gate_proj'), each('up_proj')], axis=1)
    result[f'{prefix}.experts.gate_up_proj'] = both
    result[f'{prefix}.experts.down_proj'] = each('down_proj')
  return result


def test_copies_have_to_be_copies():
  """The released V3 holds the embedding twice; a second one that differs is not left out."""
  model = tiny_mla.get_config().model
  _, tensors = published(model)
  copies = names_of(model).copies
  tensors |= {copy: tensors[name] for copy, name in copies.items()}
  tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = random(4)
  loading = prepare(model, lazies(tensors), shapes_of(model))
  assert set(loading.manifest.copies) == set(copies)
  assert loading.manifest.ignored == ('model.layers.0.self_attn.rotary_emb.inv_freq',)
  copy = next(iter(copies))
  tensors[copy] = tensors[copy] + 1
  with pytest.raises(ConfigError, match=f'1 of .* tensors are no copies: {copy}: differs from'):
    prepare(model, lazies(tensors), shapes_of(model))


@pytest.mark.parametrize('small', [0, 1 << 26])
def test_layers_of_a_scan(small, monkeypatch):
  """Read together if they are small, else one after the other; each device its own part."""
  monkeypatch.setattr(load, 'SMALL', small)
  model = tiny_v4.get_config().model
  ours, tensors = published(model)
  mesh = make_mesh(MeshConfig(data=4, expert=2))
  boxed = jax.eval_shape(lambda key: init_variables(model.build(), key), jax.random.key(0))
  shardings = tree_shardings(mesh, tree_specs(EXPERT, logical_axes(boxed)))
  places = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    nn.unbox(boxed),
    shardings,
  )
  segments = plan_segments(model)
  assert any(part.repeats > 1 for part in segments)
  done = []
  parts = prepare(model, lazies(tensors), shapes_of(model)).parts
  found = load.load(parts, places, segments, done.append)
  assert done == sorted(done)
  assert done[-1] == sum(x.nbytes for x in ours.values())
  for leaf, place in zip(jax.tree.leaves(found), jax.tree.leaves(places), strict=True):
    assert leaf.sharding.is_equivalent_to(place.sharding, leaf.ndim)
  got = load.addresses(jax.device_get(found), segments)
  assert got.keys() == ours.keys()
  for address, x in ours.items():
    np.testing.assert_array_equal(got[address], x, err_msg=address)
