"""The one place where a device mesh is made."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from deepseek_jax.core.config import ConfigError

MESH_AXES = ('replica', 'stage', 'data', 'seq', 'expert', 'model')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """How many devices lie along each axis of the mesh.

  Axes of size 1 are kept, so that every sharding rule is valid on every mesh.

  Attributes:
    replica: copies of everything; gradients are averaged over them.
    stage: pipeline stages.
    data: devices that share the batch and, with fully sharded rules, the weights. `None` takes
      the devices that the other axes leave over.
    seq: devices that share a sequence.
    expert: devices that share the experts.
    model: devices that share heads, hidden units and vocabulary (tensor parallelism).
  """

  replica: int = 1
  stage: int = 1
  data: int | None = None
  seq: int = 1
  expert: int = 1
  model: int = 1

  def __post_init__(self):
    errors = [
      f'`{axis}` is {size}; a mesh axis needs at least 1 device'
      for axis in MESH_AXES
      if (size := getattr(self, axis)) is not None and size < 1
    ]
    if errors:
      raise ConfigError(errors)

  def sizes(self, devices: int) -> dict[str, int]:
    """Returns the size of every axis on `devices` devices.

    Raises:
      ConfigError: the product of the axes is not the number of devices.
    """
    given = {axis: getattr(self, axis) for axis in MESH_AXES}
    rest = math.prod(size for size in given.values() if size is not None)
    if given['data'] is None:
      if devices % rest:
        raise ConfigError(
          f'mesh: {devices} devices cannot be shared among axes of '
          f'{rest} = {" × ".join(str(s) for s in given.values() if s is not None)} devices'
        )
      given['data'] = devices // rest
    elif rest != devices:
      raise ConfigError(
        f'mesh: the axes {given} need {rest} devices, there are {devices}; leave `data` None to '
        'let it take what is left over'
      )
    return given


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Lays the devices out as the mesh of `config`, with all six axes.

  `jax.make_mesh` is not used: its axes are `Explicit` by default, under which Linen's labels
  assert, where ours are `Auto`; and it does not cut an axis of the torus, so that 16 experts would
  not lie on 8 × 8 × 8 chips.

  Raises:
    ConfigError: the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = config.sizes(len(devices))
  shape = tuple(sizes[axis] for axis in MESH_AXES)
  types = (AxisType.Auto,) * len(MESH_AXES)
  return Mesh(arrange(devices, shape), MESH_AXES, axis_types=types)


def arrange(devices: Sequence[Any], shape: Sequence[int]) -> np.ndarray:
  """Returns the devices as an array of a shape, neighbours of the torus along the last axes."""
  if devices[0].platform == 'cpu':
    # Host devices have no topology to respect; keep their order, it makes tests repeatable.
    return np.asarray(devices).reshape(shape)
  return mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
