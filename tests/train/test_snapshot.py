"""A snapshot brings back the bits it was given, or is not used at all."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.core.config import ConfigError
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from deepseek_jax.train.snapshot import Snapshot, Snapshots


def state(value: float = 0.0, spec=('data',), dtype='float32'):
  """A tree with an array over all devices, one over some of them, a scalar, and nothing."""
  mesh = make_mesh(MeshConfig(data=4, model=2))
  put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
  return {
    'params': {'w': put(np.arange(24, dtype=dtype).reshape(8, 3) + value, *spec)},
    'half': put(jax.numpy.full((2, 5), value, 'bfloat16'), 'model'),
    'step': put(np.int32(7)),
    'ema': (),
  }


def shapes(tree):
  """What is wanted back."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def saved(tmp_path, *steps: int) -> Snapshots:
  """Snapshots of some steps."""
  snapshots = Snapshots(Snapshot(every=2), tmp_path)
  for step in steps:
    assert snapshots.save(step, state(step))
    snapshots.wait()
  return snapshots


def test_comes_back_bit_for_bit_where_it_was(tmp_path):
  snapshots = saved(tmp_path, 4)
  wanted = state(4)
  found = snapshots.restore(snapshots.newest(0, shapes(wanted)), shapes(wanted))
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert a.dtype == b.dtype
    assert a.sharding == b.sharding
    np.testing.assert_array_equal(a, b)


def test_the_state_may_be_given_away_at_once(tmp_path):
  snapshots = Snapshots(Snapshot(), tmp_path)
  given = state(3)
  snapshots.save(3, given)
  jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(given)
  snapshots.wait()
  found = snapshots.restore(3, shapes(state()))
  np.testing.assert_array_equal(found['params']['w'], state(3)['params']['w'])


def test_two_are_kept_and_only_newer_ones_count(tmp_path):
  snapshots = saved(tmp_path, 2, 4, 6)
  assert sorted(path.name for path in snapshots.folder.iterdir()) == [
    '4.bin',
    '4.json',
    '6.bin',
    '6.json',
  ]
  assert snapshots.newest(0, shapes(state())) == 6
  assert snapshots.newest(6, shapes(state())) == 0
  snapshots.clear()
  assert snapshots.newest(0, shapes(state())) == 0


def test_a_flipped_bit_a_cut_file_and_a_missing_seal_are_noticed(tmp_path):
  snapshots = saved(tmp_path, 2, 4)
  path = snapshots.folder / '4.bin'
  whole = path.read_bytes()
  for spoilt in (bytes([whole[0] ^ 1]) + whole[1:], whole[:-1], b''):
    path.write_bytes(spoilt)
    assert snapshots.newest(0, shapes(state())) == 2
  path.write_bytes(whole)
  assert snapshots.newest(0, shapes(state())) == 4
  (snapshots.folder / '4.json').unlink()
  assert snapshots.newest(0, shapes(state())) == 2
  (snapshots.folder / '2.json').write_text(json.dumps({'step': 2}))
  assert snapshots.newest(0, shapes(state())) == 0


def test_another_layout_is_not_used(tmp_path):
  snapshots = saved(tmp_path, 2)
  assert snapshots.newest(0, shapes(state(spec=('model',)))) == 0
  assert snapshots.newest(0, shapes(state(dtype='float16'))) == 0
  assert snapshots.newest(0, shapes(state())) == 2


def test_a_disk_that_is_not_there_costs_the_snapshot_only(tmp_path):
  (tmp_path / 'file').touch()
  snapshots = Snapshots(Snapshot(folder=str(tmp_path / 'file')), tmp_path / 'run')
  snapshots.save(2, state())
  snapshots.wait()
  assert isinstance(snapshots.failure, OSError)
  assert snapshots.newest(0, shapes(state())) == 0


def test_every_is_at_least_one():
  with pytest.raises(ConfigError, match='every'):
    Snapshot(every=0)
