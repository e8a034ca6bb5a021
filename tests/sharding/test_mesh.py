"""One mesh: six axes, none dropped, all of them automatic."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from deepseek_jax.core.config import ConfigError
from deepseek_jax.sharding.mesh import MESH_AXES, MeshConfig, make_mesh


@pytest.mark.parametrize(
  ('config', 'sizes'),
  [
    (MeshConfig(), (1, 1, 8, 1, 1, 1)),
    (MeshConfig(model=4), (1, 1, 2, 1, 1, 4)),
    (MeshConfig(data=2, expert=4), (1, 1, 2, 1, 4, 1)),
    (MeshConfig(replica=2, stage=1, data=1, seq=2, expert=1, model=2), (2, 1, 1, 2, 1, 2)),
    (MeshConfig(stage=8), (1, 8, 1, 1, 1, 1)),
  ],
)
def test_six_automatic_axes(config, sizes):
  """Axes of size 1 stay, so that every rule is valid on every mesh."""
  mesh = make_mesh(config)
  assert mesh.axis_names == MESH_AXES
  assert mesh.devices.shape == sizes == tuple(config.sizes(8).values())
  assert mesh.axis_types == (AxisType.Auto,) * 6
  # Every device once, in order.
  assert [device.id for device in mesh.devices.flat] == [device.id for device in jax.devices()]


def test_jax_would_choose_otherwise():
  """The trap that `make_mesh` is there for: JAX's own default is not `Auto`."""
  assert jax.make_mesh((8,), ('data',)).axis_types == (AxisType.Explicit,)


def test_fewer_devices():
  """A mesh of some devices only holds those."""
  mesh = make_mesh(MeshConfig(), jax.devices()[:3])
  assert mesh.size == 3
  x = jax.device_put(np.arange(6.0), jax.NamedSharding(mesh, PartitionSpec('data')))
  assert [shard.data.tolist() for shard in x.addressable_shards] == [[0, 1], [2, 3], [4, 5]]


def test_axes_that_do_not_multiply_to_the_devices():
  """Too many, too few, and no whole rest for `data`: each says how many there are."""
  with pytest.raises(ConfigError, match=r'need 16 devices, there are 8; leave `data` None'):
    make_mesh(MeshConfig(data=4, model=4))
  with pytest.raises(ConfigError, match=r'need 4 devices, there are 8'):
    MeshConfig(data=2, model=2).sizes(8)
  with pytest.raises(ConfigError, match=r'8 devices cannot be shared among axes of 3 = 1 × 1 × 3'):
    MeshConfig(seq=3).sizes(8)
  with pytest.raises(ConfigError, match=r'8 devices cannot be shared among axes of 16'):
    MeshConfig(expert=4, model=4).sizes(8)


def test_all_bad_sizes_at_once():
  """Sizes below one are refused, every one of them."""
  with pytest.raises(ConfigError) as caught:
    MeshConfig(replica=0, data=-1, model=0)
  assert caught.value.messages == (
    '`replica` is 0; a mesh axis needs at least 1 device',
    '`data` is -1; a mesh axis needs at least 1 device',
    '`model` is 0; a mesh axis needs at least 1 device',
  )
