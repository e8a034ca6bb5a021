"""Arrays of a checkpoint by canonical address, so that another grouping of layers can take them.

A scan stacks the arrays of its layers; which layers share one depends on the plan. The canonical
address `layers/<i>/…` does not: an array here is a *piece*, an entry of a stacked array or a whole
one, and pieces of one plan are put together as those of another.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from deepseek_jax.models.plan import Segment
from deepseek_jax.train.checkpoint_reader import address_of, context, read_tree, reading

_STACKED = re.compile(r'(.*?)(?:^|(?<=/))stack/segment_(\d+)/block_(\d+)/(.*)')
_LAYER = re.compile(r'(.*(?:^|/)layers/)(\d+)(/.*)')


@dataclasses.dataclass(frozen=True)
class Piece:
  """Where a piece lies.

  Attributes:
    address: of the array in the tree.
    index: entry of its axis of layers, or None for all of it.
    shape: of the piece.
    dtype: of the piece.
    axis: the axis of layers: the first, but where replicas have arrays [R, ...] of their own.
  """

  address: str
  index: int | None
  shape: tuple[int, ...]
  dtype: np.dtype
  axis: int = 0

  def __str__(self) -> str:
    """Such as 'float32[4, 8]'."""
    return f'{self.dtype.name}{list(self.shape)}'


@dataclasses.dataclass(frozen=True)
class Transfer:
  """What of a checkpoint goes where.

  Attributes:
    sources: canonical address of each wanted piece -> where it comes from.
    fresh: canonical addresses that the checkpoint does not have.
    different: those that it has in another shape or dtype, with both in words.
    unused: canonical addresses of the checkpoint that nobody wants.
  """

  sources: dict[str, Piece]
  fresh: tuple[str, ...]
  different: dict[str, str]
  unused: tuple[str, ...]


def flat(tree: Any) -> dict[str, Any]:
  """Returns address -> leaf of a pytree of arrays of any shape, such as `opt_state/0/mu/head`."""
  return {address_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def pieces(leaves: Mapping[str, Any], segments: Sequence[Segment]) -> dict[str, Piece]:
  """Returns the pieces of arrays by canonical address; shapes such as [repeats, D] are cut.

  Args:
    leaves: address -> anything with a shape and a dtype.
    segments: the plan whose stack they are of.
  """
  starts = np.cumsum([0, *(part.layers for part in segments)]).tolist()
  found = {}
  for address, leaf in leaves.items():
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    match = _STACKED.fullmatch(address)
    if match is None:
      found[address] = Piece(address, None, shape, dtype)
      continue
    head, number, place, rest = match.groups()
    part = segments[int(number)]
    axis = int(address.startswith('carry/'))
    each = shape[:axis] + shape[axis + 1 :]
    for repeat in range(part.repeats):
      layer = starts[int(number)] + repeat * len(part.pattern) + int(place)
      name = f'{head}layers/{layer}/{rest}'
      if part.repeats == 1:
        found[name] = Piece(address, None, shape, dtype)
      else:
        found[name] = Piece(address, repeat, each, dtype, axis)
  return found


def match_pieces(source: Mapping[str, Piece], target: Mapping[str, Piece]) -> Transfer:
  """Finds for each piece of a target the one of the same address, shape and dtype.

  Args:
    source: by canonical address.
    target: by canonical address.
  """
  fitting = {
    address: source[address]
    for address, piece in target.items()
    if address in source and str(source[address]) == str(piece)
  }
  return Transfer(
    sources=fitting,
    fresh=tuple(address for address in target if address not in source),
    different={
      address: f'found {source[address]}, expected {piece}'
      for address, piece in target.items()
      if address in source and address not in fitting
    },
    unused=tuple(address for address in source if address not in target),
  )


def load_pieces(
  path: pathlib.Path,
  transfer: Transfer,
  target: Any,
  target_pieces: Mapping[str, Piece],
  base: Any = None,
) -> Any:
  """Reads pieces of a checkpoint and puts them together as a target wants them.

  Every array is read into the layout of the target that takes it; layers are regrouped on the
  devices.

  Args:
    path: folder of the step.
    transfer: which pieces.
    target: pytree of shapes, dtypes and `NamedSharding`s.
    target_pieces: of the target.
    base: arrays of the target for what the transfer does not bring; None where it brings all.

  Returns:
    The target's arrays.
  """
  wanted = flat(target)
  layouts: dict[str, NamedSharding] = {}
  for address, source in transfer.sources.items():
    place = target_pieces[address]
    sharding = wanted[place.address].sharding
    layouts.setdefault(source.address, _layout(sharding, place, source))
  arrays = _read(path, layouts)
  kept = {} if base is None else flat(base)
  members: dict[str, list[tuple[int | None, Piece | None]]] = {}
  for address, place in target_pieces.items():
    members.setdefault(place.address, []).append((place.index, transfer.sources.get(address)))

  def assemble(arrays: dict[str, jax.Array], kept: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def pick(address: str, index: int | None, source: Piece | None) -> jax.Array:
      if source is None:
        return kept[address] if index is None else kept[address][index]
      array = arrays[source.address]
      return array if source.index is None else jnp.take(array, source.index, source.axis)

    result = {}
    for address, parts in members.items():
      rows = [pick(address, index, source) for index, source in parts]
      axis = int(address.startswith('carry/'))
      result[address] = rows[0] if parts[0][0] is None else jnp.stack(rows, axis)
    return result

  shardings = {address: leaf.sharding for address, leaf in wanted.items()}
  joined = jax.jit(assemble, out_shardings=shardings)(arrays, kept)
  return jax.tree_util.tree_map_with_path(lambda key, _: joined[address_of(key)], target)


def collapse(addresses: Iterable[str]) -> list[str]:
  """Writes addresses that differ in the layer only as one: `params/layers/3–5/norm/scale`."""
  layers: dict[str, list[int]] = {}
  for address in addresses:
    match = _LAYER.fullmatch(address)
    if match is None:
      layers.setdefault(address, [])
    else:
      layers.setdefault(f'{match[1]}*{match[3]}', []).append(int(match[2]))
  return [name.replace('*', _ranges(found), 1) for name, found in layers.items()]


def _ranges(numbers: Sequence[int]) -> str:
  parts: list[list[int]] = []
  for number in sorted(numbers):
    if parts and number == parts[-1][1] + 1:
      parts[-1][1] = number
    else:
      parts.append([number, number])
  return ','.join(str(a) if a == b else f'{a}–{b}' for a, b in parts)


def _layout(sharding: NamedSharding, place: Piece, source: Piece) -> NamedSharding:
  """The target's layout for a source that may have a leading axis more or less."""
  rank = len(place.shape) + (place.index is not None)
  spec = [*sharding.spec, *(None,) * (rank - len(sharding.spec))]
  if place.index is not None:
    del spec[place.axis]
  if source.index is not None:
    spec.insert(source.axis, None)
  return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _read(path: pathlib.Path, layouts: Mapping[str, NamedSharding]) -> dict[str, jax.Array]:
  """Reads the named arrays of a checkpoint, each into its layout."""

  def ask(key: Any, leaf: Any) -> Any:
    layout = layouts.get(address_of(key))
    # Orbax leaves out what stands there as an ellipsis.
    return ... if layout is None else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)

  asked = jax.tree_util.tree_map_with_path(ask, read_tree(path))
  with reading(path), context():
    state = ocp.load_checkpointables(path.absolute(), {'state': asked})['state']
  return {address: leaf for address, leaf in flat(state).items() if address in layouts}
