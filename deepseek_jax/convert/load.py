"""Published tensors into the arrays of a model, each read straight to where it stays."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from deepseek_jax.convert.lazy import Lazy, cast, fill, stacked
from deepseek_jax.convert.names import Entry, Names, names_of, spellings
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.tree import flatten, unflatten
from deepseek_jax.models.decoder import canonical
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.deepseek_v4 import DeepSeekV4
from deepseek_jax.models.plan import Segment, locate

IGNORED = re.compile(r'rotary_emb\.inv_freq$')
"""Tensors of older files that follow from the config."""
SHOWN = 8
"""Names that an error lists of each kind."""
SMALL = 1 << 26
"""Bytes of an array that is read for all layers at once: others need a program to be compiled."""
ROWS = 1 << 12
"""Rows of a copy that are compared at once."""


class Manifest(NamedTuple):
  """What was done with every tensor of a folder.

  Attributes:
    read: names of those that are now in the model.
    copies: names of those that hold what another one does.
    ignored: names of those that follow from the config.
    bytes: of what was read, as it is in memory.
    without_mtp: the config speaks of multi-token prediction, and the files do not have it.
  """

  read: tuple[str, ...]
  copies: tuple[str, ...]
  ignored: tuple[str, ...]
  bytes: int
  without_mtp: bool = False


class Loading(NamedTuple):
  """What is going to be read.

  Attributes:
    model: the model, without multi-token prediction where the files have none.
    parts: our arrays by canonical address.
    manifest: of the files.
  """

  model: DeepSeekV3 | DeepSeekV4
  parts: dict[str, Lazy]
  manifest: Manifest


def prepare(
  model: DeepSeekV3 | DeepSeekV4, tensors: Mapping[str, Lazy], shapes: Mapping[str, Any]
) -> Loading:
  """Finds the tensors of every array of a model; nothing but copies is read yet.

  Transformers' files have the weights of a model without those of multi-token prediction, and a
  config that still speaks of it: if none of them is there, the model has none.

  Args:
    model: what the config describes.
    tensors: by name, as `open_published` gives them.
    shapes: shape and dtype of each array of the model by canonical address.

  Raises:
    ConfigError: with all tensors that are missing, left over, of a wrong shape, or copies that
      differ.
  """
  names = names_of(model)
  entries = _spelled(names.entries, tensors)
  ahead = [entry for entry in entries if entry.ours.split('/')[1].startswith('mtp_')]
  without = bool(ahead) and not any(name in tensors for entry in ahead for name in entry.theirs)
  if without:
    names = names_of(model := dataclasses.replace(model, mtp=None))
    entries = _spelled(names.entries, tensors)
  errors = _faults(entries, names, tensors, shapes)
  if errors:
    raise ConfigError(errors)
  parts = {
    entry.ours: entry.form.ours(
      [cast(tensors[name], shapes[entry.ours].dtype) for name in entry.theirs]
    )
    for entry in entries
  }
  manifest = Manifest(
    read=tuple(name for entry in entries for name in entry.theirs),
    copies=tuple(name for name in names.copies if name in tensors),
    ignored=tuple(name for name in tensors if IGNORED.search(name)),
    bytes=sum(part.bytes for part in parts.values()),
    without_mtp=without,
  )
  return Loading(model, parts, manifest)


def _spelled(entries: Sequence[Entry], tensors: Mapping[str, Lazy]) -> list[Entry]:
  """Returns the entries under those names, of the hub's and of transformers', that fit best."""

  def found(spelling: list[Entry]) -> int:
    return sum(name in tensors for entry in spelling for name in entry.theirs)

  return max(spellings(entries), key=found)


def _faults(
  entries: Sequence[Entry],
  names: Names,
  tensors: Mapping[str, Lazy],
  shapes: Mapping[str, Any],
) -> list[str]:
  """Lists all that is wrong with the tensors."""
  wanted = {name for entry in entries for name in entry.theirs}
  missing = [name for entry in entries for name in entry.theirs if name not in tensors]
  known = wanted | names.copies.keys()
  extra = [name for name in tensors if name not in known and not IGNORED.search(name)]
  misshapen = []
  for entry in entries:
    leaf = shapes[entry.ours]
    for name, want in zip(entry.theirs, entry.form.theirs(_abstract(leaf)), strict=True):
      if name in tensors and tensors[name].shape != want.shape:
        found = list(tensors[name].shape)
        misshapen.append(f'{name}: found {found}, expected {list(want.shape)}')
  differing = [
    f'{copy}: differs from {name}, which it is expected to repeat'
    for copy, name in names.copies.items()
    if copy in tensors and name in tensors and not _same(tensors[copy], tensors[name])
  ]
  groups = {
    'are missing': missing,
    'are not of this model': extra,
    'have another shape': misshapen,
    'are no copies': differing,
  }
  errors = []
  for what, group in groups.items():
    if group:
      errors.append(f'{len(group)} of {len(wanted)} tensors {what}: {"; ".join(group[:SHOWN])}')
      if len(group) > SHOWN:
        errors[-1] += f'; … and {len(group) - SHOWN} more'
  return errors


def _abstract(leaf: Any) -> Lazy:
  def read(index: Any) -> np.ndarray:
    raise AssertionError('only shapes are asked for')

  return Lazy(tuple(leaf.shape), np.dtype(leaf.dtype), read)


def _same(a: Lazy, b: Lazy) -> bool:
  if a.shape != b.shape:
    return False
  starts = range(0, a.shape[0], ROWS)
  return all(np.array_equal(a[start : start + ROWS], b[start : start + ROWS]) for start in starts)


def load(
  parts: Mapping[str, Lazy],
  places: Mapping[str, Any],
  segments: Sequence[Segment],
  progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
  """Reads arrays to where they stay, one layer's at a time.

  On the host there is never more than one array of one layer, or of it the part of one device;
  small ones are read for all layers together.

  Args:
    parts: our arrays by canonical address.
    places: variables of the model, grouped for its scans: leaves with shape, dtype and sharding.
    segments: the scans.
    progress: told the bytes that are read, array by array.

  Returns:
    The variables, grouped for the scans.
  """
  flat = flatten(places)
  homes: dict[str, dict[int | None, Lazy]] = {}
  for address, part in parts.items():
    home, repeat = locate(address, segments)
    homes.setdefault(home, {})[repeat] = part
  filled: dict[str, jax.Array] = {}
  done = 0
  for home, layers in homes.items():
    leaf = flat[home]
    own = [layers[repeat] for repeat in sorted(layers, key=lambda repeat: repeat or 0)]
    if None in layers:
      filled[home] = _placed(own[0], leaf.sharding)
    elif sum(part.bytes for part in own) <= SMALL:
      filled[home] = _placed(stacked(own), leaf.sharding)
    else:
      make = functools.partial(jnp.zeros, leaf.shape, leaf.dtype)
      filled[home] = jax.jit(make, out_shardings=leaf.sharding)()
      for repeat, part in enumerate(own):
        layer = _placed(part, _of_one(leaf.sharding))
        filled[home] = _putting(leaf.sharding)(filled[home], layer, jnp.int32(repeat))
        progress(done := done + part.bytes)
      continue
    progress(done := done + sum(part.bytes for part in own))
  tree = unflatten({home: filled[home] for home in flat})
  return {name: tree.get(name, {}) for name in ('params', 'buffers')}


def addresses(shapes: Mapping[str, Any], segments: Sequence[Segment]) -> dict[str, Any]:
  """Returns the leaves of grouped variables by canonical address."""
  return flatten({name: canonical(tree, segments) for name, tree in shapes.items()})


def _placed(part: Lazy, sharding: Sharding) -> jax.Array:
  def read(index: tuple[slice, ...] | None) -> np.ndarray:
    found = part[... if index is None else index]
    # What lies in a file that is mapped into memory would change with the file.
    if found.flags.owndata and found.flags.c_contiguous:
      return found
    fill(result := np.empty(found.shape, found.dtype), found)
    return result

  return jax.make_array_from_callback(part.shape, sharding, read)


def _of_one(sharding: Sharding) -> Sharding:
  """Where one layer's array lies, of those that lie in one."""
  if not isinstance(sharding, NamedSharding):
    return sharding
  return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


@functools.cache
def _putting(sharding: Sharding) -> Any:
  def put(whole: jax.Array, part: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(whole, part, index, 0)

  # The array that is filled keeps its memory.
  return jax.jit(put, donate_argnums=0, out_shardings=sharding)
