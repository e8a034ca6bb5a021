"""Published folders: what is exported comes back bit by bit, on any mesh; what is wrong is told."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import linen as nn
from huggingface_hub import constants

from configs import tiny_dsa, tiny_mla, tiny_v4
from deepseek_jax.convert.export import SUMS, check_sums
from deepseek_jax.convert.lazy import stored
from deepseek_jax.convert.published import AHEAD
from deepseek_jax.convert.safetensors import INDEX, open_file, open_folder, write_file
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.tree import flatten
from deepseek_jax.hub import Pretrained, from_pretrained
from deepseek_jax.hub.pretrained import decoder_of
from deepseek_jax.models.decoder import init_variables
from deepseek_jax.models.remat import Unrolled
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import EXPERT

ONE = pytest.mark.parametrize('published', ['v3'], indirect=True)
FAMILIES = {'v3': tiny_mla, 'v3_2': tiny_dsa, 'v4': tiny_v4}
IDS = [1, 70, 3, 40, 5, 9, 200]


@pytest.fixture(scope='module', params=['v3', 'v3_2', pytest.param('v4', marks=pytest.mark.slow)])
def published(request, tmp_path_factory):
  """A model with random weights, and the folder it was exported to."""
  experiment = FAMILIES[request.param].get_config()
  decoder = decoder_of(experiment, Unrolled())
  variables = nn.meta.unbox(jax.jit(lambda key: init_variables(decoder, key))(jax.random.key(1)))
  rng = np.random.default_rng(0)

  def moved(x):
    # What begins with zeros or ones would hide that it was not read.
    shift = 0.1 * rng.standard_normal(x.shape).astype(np.float32)
    return x if x.dtype == np.int32 else x + shift

  variables = jax.tree.map(moved, variables)
  model = Pretrained(experiment=experiment, variables=variables, apart=Unrolled())
  folder = tmp_path_factory.mktemp('published') / request.param
  assert len(set(model.export(folder))) == len(open_folder(folder)) + len(open_file(folder / AHEAD))
  return model, folder


@pytest.fixture
def copied(published, tmp_path):
  """A copy of the folder, to be damaged."""
  return shutil.copytree(published[1], tmp_path / 'copy')


def assert_equal(got, want):
  got, want = flatten(got), flatten(want)
  assert got.keys() == want.keys()
  for address, x in want.items():
    assert got[address].dtype == x.dtype, address
    np.testing.assert_array_equal(got[address], x, err_msg=address)


def test_there_and_back(published, tmp_path):
  """Bit by bit, and the second export has the bytes of the first."""
  model, folder = published
  found = from_pretrained(folder)
  assert_equal(found.variables, model.variables)
  np.testing.assert_array_equal(found.logits(IDS), model.logits(IDS))
  names = {*open_folder(folder), *open_file(folder / AHEAD)}
  assert set(found.manifest.read) == names
  assert found.manifest.bytes == sum(x.nbytes for x in jax.tree.leaves(model.variables))
  assert not found.manifest.without_mtp
  assert list(found.export(tmp_path / 'again'))
  for name in ('model.safetensors', AHEAD, 'config.json', 'tokenizer.json'):
    assert (tmp_path / 'again' / name).read_bytes() == (folder / name).read_bytes(), name
  np.testing.assert_array_equal(found.tokenizer.encode('Ökonom'), model.tokenizer.encode('Ökonom'))


@ONE
def test_every_device_reads_its_own_part(published):
  """On a mesh."""
  model, folder = published
  found = from_pretrained(folder, mesh=MeshConfig(data=2, expert=4), rules=EXPERT)
  assert_equal(found.variables, model.variables)
  spread = [x for x in jax.tree.leaves(found.variables) if not x.sharding.is_fully_replicated]
  assert spread
  assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(found.variables))


@ONE
def test_in_bfloat16(published):
  """Matrices alone are rounded; what routes and mixes lanes stays exact."""
  _, folder = published
  found = from_pretrained(folder, dtype='bfloat16')
  assert found.experiment.precision.compute == 'bfloat16'
  kinds = {address: x.dtype.name for address, x in flatten(found.variables).items()}
  assert kinds['params/embedding/weight'] == kinds['params/head/weight'] == 'bfloat16'
  for address, kind in kinds.items():
    if 'router' in address or 'norm' in address or 'residual' in address:
      assert kind != 'bfloat16', address
  assert np.isfinite(np.asarray(found.logits(IDS))).all()


@ONE
def test_what_does_not_fit_is_told_at_once(published, copied):
  """All that is missing, left over and misshapen, in one error."""
  path = copied / 'model.safetensors'
  tensors = {name: stored(np.array(x.whole())) for name, x in open_file(path).items()}
  name = next(name for name in tensors if name.endswith('norm.weight'))
  lost = next(name for name in tensors if name.endswith(('w1.weight', 'gate_proj.weight')))
  tensors[name] = stored(np.zeros(3, np.float32))
  tensors['model.strange'] = tensors.pop(lost)
  list(write_file(path, tensors))
  with pytest.raises(ConfigError) as caught:
    from_pretrained(copied)
  missing, extra, misshapen = caught.value.messages
  total = len(open_folder(published[1])) + len(open_file(copied / AHEAD))
  assert missing == f'1 of {total} tensors are missing: {lost}'
  assert extra.endswith('tensors are not of this model: model.strange')
  assert f'{name}: found [3], expected' in misshapen


@ONE
def test_without_multi_token_prediction(published, copied):
  """Other programs leave it out, and the config still speaks of it."""
  model, _ = published
  (copied / AHEAD).unlink()
  found = from_pretrained(copied)
  assert found.manifest.without_mtp
  assert found.model.mtp is None
  np.testing.assert_array_equal(found.logits(IDS), model.logits(IDS))


@ONE
def test_an_export_goes_on_where_it_was_broken_off(published, tmp_path):
  """Whole files stay; another model is refused."""
  model, folder = published
  target = tmp_path / 'broken'
  half = len(open_folder(folder)) // 2
  for _ in zip(range(half), model.export(target)):
    pass
  with pytest.raises(ConfigError, match='holds no checkpoint'):
    from_pretrained(target)
  list(model.export(target))
  assert_equal(from_pretrained(target).variables, model.variables)
  check_sums(target)
  stamp = (target / 'model.safetensors').stat().st_mtime_ns
  list(model.export(target))
  assert (target / 'model.safetensors').stat().st_mtime_ns == stamp
  moved = jax.tree.map(lambda x: x + 1, model.variables)
  for other in (dataclasses.replace(model, step=7), dataclasses.replace(model, variables=moved)):
    with pytest.raises(ConfigError, match='holds another model'):
      list(other.export(target))
  (tmp_path / 'file').mkdir()
  (tmp_path / 'file' / 'precious').write_text('data')
  with pytest.raises(ConfigError, match='is not empty'):
    list(model.export(tmp_path / 'file'))


@ONE
def test_checksums(copied):
  """A flipped bit and a missing file are named."""
  check_sums(copied)
  data = bytearray((copied / 'model.safetensors').read_bytes())
  data[-1] ^= 1
  (copied / 'model.safetensors').write_bytes(data)
  (copied / 'tokenizer.json').unlink()
  with pytest.raises(ConfigError) as caught:
    check_sums(copied)
  changed, missing = sorted(caught.value.messages)
  assert changed.endswith(f'model.safetensors: differs from its checksum in {SUMS}')
  assert missing.endswith('tokenizer.json: is missing')


@ONE
def test_a_part_is_replaced(published):
  """Everything that fits is kept, and what is fresh is listed."""
  model, folder = published
  found = from_pretrained(folder, overrides={'mtp': None})
  assert found.model.mtp is None
  np.testing.assert_array_equal(found.logits(IDS), model.logits(IDS))
  gated = from_pretrained(folder, overrides={'attention': 'Gated(keep=Share(share=0.5))'})
  assert gated.fresh
  assert all('/attention/' in address for address in gated.fresh)


@ONE
def test_a_checkpoint_of_it(published, tmp_path):
  """Saved as a run's checkpoint, in whatever format its matrices are."""
  _, folder = published
  for dtype in ('float32', 'bfloat16'):
    found = from_pretrained(folder, dtype=dtype)
    assert found.save(tmp_path / dtype) == tmp_path / dtype / 'checkpoints' / '0'
    again = from_pretrained(tmp_path / dtype)
    assert_equal(again.variables, found.variables)
    assert again.experiment == found.experiment
  spread = from_pretrained(tmp_path / 'bfloat16', mesh=MeshConfig(data=2, expert=4), rules=EXPERT)
  assert_equal(spread.variables, found.variables)
  with pytest.raises(ConfigError, match='exists already'):
    found.save(tmp_path / dtype)


def test_what_is_no_model(tmp_path, monkeypatch):
  """No folder, no config, no network."""
  with pytest.raises(ConfigError, match='there is no such folder'):
    from_pretrained(tmp_path / 'absent')
  (tmp_path / 'config.json').write_text(json.dumps({'name': 'of a run that saved nothing'}))
  with pytest.raises(ConfigError, match='holds no checkpoint'):
    from_pretrained(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'llama'}))
  with pytest.raises(ConfigError, match="`model_type` is 'llama'"):
    from_pretrained(tmp_path)
  with pytest.raises(ConfigError, match="dtype: found 'float61'"):
    from_pretrained(tmp_path, dtype='float61')
  with pytest.raises(ConfigError, match='step: found 3'):
    from_pretrained(tmp_path, step=3)
  with pytest.raises(ConfigError, match='expected `mesh` too'):
    from_pretrained(tmp_path, rules=EXPERT)
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  with pytest.raises(ConfigError, match='nobody/nothing: is no folder here, and the repository'):
    from_pretrained('nobody/nothing')


@ONE
def test_several_files(published, tmp_path):
  """An index names the file of every tensor."""
  model, folder = published
  files = list(model.export(tmp_path / 'many', largest=200_000))
  assert (tmp_path / 'many' / INDEX).is_file()
  assert len(list((tmp_path / 'many').glob('model-*.safetensors'))) > 1
  assert len(files) == len(open_folder(folder)) + len(open_file(folder / AHEAD))
  assert_equal(from_pretrained(tmp_path / 'many').variables, model.variables)
