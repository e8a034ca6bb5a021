"""The one table that maps the names of array axes to axes of the device mesh."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.core.config import ConfigError
from deepseek_jax.sharding.mesh import MESH_AXES

MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """Mesh axes over which each logical axis is spread; an empty tuple means whole on every device.

  Linen's own table silently replicates a misspelt axis and silently drops the second of two
  colliding ones; this one raises. Activations: batch, seq, act_* and cache_length. Weights: the
  rest; `expert_embed` and `expert_mlp` are the axes of expert weights, which shard otherwise than
  dense ones, and `routed` counts experts where a router scores them, all of them for every token.
  """

  batch: MeshAxes = ()
  seq: MeshAxes = ()
  act_embed: MeshAxes = ()
  act_heads: MeshAxes = ()
  act_expert: MeshAxes = ()
  act_vocab: MeshAxes = ()
  cache_length: MeshAxes = ()
  embed: MeshAxes = ()
  heads: MeshAxes = ()
  latent: MeshAxes = ()
  mlp: MeshAxes = ()
  vocab: MeshAxes = ()
  expert: MeshAxes = ()
  expert_embed: MeshAxes = ()
  expert_mlp: MeshAxes = ()
  routed: MeshAxes = ()
  lanes: MeshAxes = ()
  layers: MeshAxes = ()
  stage: MeshAxes = ()

  def __post_init__(self):
    errors = []
    for field in dataclasses.fields(self):
      axes = getattr(self, field.name)
      if not isinstance(axes, tuple):
        errors.append(f"`{field.name}` is {axes!r}; expected a tuple of mesh axes like ('data',)")
        continue
      for axis in axes:
        if axis not in MESH_AXES:
          errors.append(f'`{field.name}` maps to `{axis}`; {_near(axis, MESH_AXES)}')
    if errors:
      raise ConfigError(errors)

  def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
    """Translates logical axis names, one for each axis of an array, to a partition spec.

    Raises:
      ConfigError: a name is not in the table, or two axes of one array claim one mesh axis.
    """
    names = tuple(field.name for field in dataclasses.fields(self))
    taken: dict[str, str] = {}
    entries: list[Any] = []
    for axis in axes:
      if axis is None:
        entries.append(None)
        continue
      if axis not in names:
        raise ConfigError(f'logical axis `{axis}` of {tuple(axes)}: {_near(axis, names)}')
      mesh_axes = getattr(self, axis)
      for mesh_axis in mesh_axes:
        if mesh_axis in taken:
          raise ConfigError(
            f'axes {tuple(axes)}: `{taken[mesh_axis]}` and `{axis}` both claim mesh axis '
            f'`{mesh_axis}`; give one of them another axis, or none'
          )
        taken[mesh_axis] = axis
      entries.append(mesh_axes[0] if len(mesh_axes) == 1 else (mesh_axes or None))
    return PartitionSpec(*entries)

  def without(self, mesh_axis: str) -> 'Rules':
    """Returns the table for where one mesh axis has been dealt with: nothing lies along it."""
    fields = (field.name for field in dataclasses.fields(self))
    kept = {name: tuple(a for a in getattr(self, name) if a != mesh_axis) for name in fields}
    return dataclasses.replace(self, **kept)

  def constrain(self, x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Pins the layout of an activation inside a jitted function.

    Where no mesh is set (a notebook, a single device) there is nothing to lay out: the names are
    still checked, and the array is returned.
    """
    if x.ndim != len(axes):
      raise ConfigError(f'{len(axes)} axis names {tuple(axes)} for an array of rank {x.ndim}')
    spec = self.spec(axes)
    if jax.sharding.get_abstract_mesh().empty:
      return x
    return jax.lax.with_sharding_constraint(x, spec)


def logical_axes(variables: Any) -> Any:
  """Returns the axis names of every array in labelled (boxed) variables, as tuples."""

  def names(leaf):
    if isinstance(leaf, nn.Partitioned):
      return tuple(leaf.names)
    return (None,) * leaf.ndim

  return jax.tree.map(names, variables, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def tree_specs(rules: Rules, axes: Any) -> Any:
  """Maps a pytree of axis-name tuples to partition specs, naming the address in errors."""

  def spec(path, names):
    try:
      return rules.spec(names)
    except ConfigError as error:
      address = '/'.join(str(getattr(key, 'key', key)) for key in path)
      raise ConfigError(f'{address}: {error}') from None

  return jax.tree_util.tree_map_with_path(spec, axes, is_leaf=lambda x: isinstance(x, tuple))


def tree_shardings(mesh: Mesh, specs: Any) -> Any:
  """Puts a pytree of partition specs on a mesh."""
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
  )


def shard_count(spec_entry: Any, sizes: dict[str, int]) -> int:
  """Returns the number of pieces one axis is cut into, given the sizes of the mesh axes."""
  if spec_entry is None:
    return 1
  axes = (spec_entry,) if isinstance(spec_entry, str) else spec_entry
  count = 1
  for axis in axes:
    count *= sizes[axis]
  return count


def check_divisible(shapes: Any, specs: Any, sizes: dict[str, int]) -> list[str]:
  """Lists every axis of every array that its mesh axes do not divide, with its address.

  Raises:
    ValueError: there are not as many specs as shapes.
  """
  errors = []
  flat_specs = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
  flat_shapes = jax.tree_util.tree_leaves_with_path(shapes)
  for (path, leaf), spec in zip(flat_shapes, flat_specs, strict=True):
    for place, (size, entry) in enumerate(zip(leaf.shape, spec)):
      pieces = shard_count(entry, sizes)
      if size % pieces:
        address = '/'.join(str(getattr(key, 'key', getattr(key, 'name', key))) for key in path)
        errors.append(
          f'{address}: axis {place} of shape {tuple(leaf.shape)} is not divisible by the '
          f'{pieces} devices of mesh axis {entry!r}'
        )
  return errors


def _near(word: str, known: Sequence[str]) -> str:
  match = difflib.get_close_matches(word, known, n=1)
  return f'did you mean `{match[0]}`?' if match else f'known are {", ".join(known)}'
