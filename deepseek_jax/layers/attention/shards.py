"""Attention where the compiler spreads arrays over devices: each attends for its own part.

Rows and heads know nothing of each other. Left to itself, the compiler can spread neither a kernel
nor the blocks that a loop visits. Rows or heads that their devices do not divide (one row, in
decoding; fewer key heads than devices) are whole on each. Where the sequence is spread, the
compiler is left to it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.ops.attention.blocked import NONE, attend_blocked
from deepseek_jax.ops.attention.blocks import Extras, Window
from deepseek_jax.ops.attention.gathered import KeySets, Selected, attend_blocks, attend_selected
from deepseek_jax.ops.attention.reference import Seen
from deepseek_jax.ops.mesh import arrays_are_whole
from deepseek_jax.sharding.rules import Rules, shard_count


class Parts(NamedTuple):
  """How rows and heads are spread.

  Attributes:
    free: mesh axes that are not dealt with yet.
    rows: those that rows are spread over.
    heads: those that heads are spread over.
    tokens: those that tokens are spread over.
  """

  free: frozenset[str]
  rows: tuple[str, ...]
  heads: tuple[str, ...]
  tokens: tuple[str, ...] = ()

  def spec(self, heads_at: int | None = None) -> PartitionSpec:
    """Returns how an array [rows, tokens, …] lies whose axis `heads_at` is heads."""
    first = self.rows or None, self.tokens or None
    if heads_at is None:
      return PartitionSpec(*first)
    return PartitionSpec(*first, *(None,) * (heads_at - 2), self.heads or None)

  def run(self, function: Callable[..., Any], ins: Any, outs: Any) -> Callable[..., Any]:
    """Returns `function` of each device's own parts."""
    return jax.shard_map(
      function, in_specs=ins, out_specs=outs, axis_names=set(self.free), check_vma=False
    )


def own_parts(rules: Rules, rows: int, heads: int, tokens: tuple[str, ...] = ()) -> Parts | None:
  """Returns how so many rows and heads are spread, or None where arrays are whole or it is not so.

  Args:
    rules: how activations lie on the mesh that is set.
    rows: B.
    heads: H, or the groups of them that share keys.
    tokens: mesh axes that tokens are spread over, where the caller sees to what they need.
  """
  mesh = jax.sharding.get_abstract_mesh()
  sizes = dict(mesh.shape)
  # Inside of another `shard_map` its axes have been dealt with.
  free = frozenset(mesh.axis_names) - set(mesh.manual_axes)
  left = tuple(axis for axis in rules.seq if axis in free and axis not in tokens)
  if arrays_are_whole() or shard_count(left, sizes) > 1:
    return None
  shared = [
    tuple(axis for axis in axes if axis in free) if size % shard_count(axes, sizes) == 0 else ()
    for axes, size in ((rules.batch, rows), (rules.act_heads, heads))
  ]
  return Parts(free, shared[0], shared[1], tokens)


def attend_sharded(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  seen: Seen,
  rules: Rules,
  *,
  scale: float,
  window: Window | None = None,
  in_order: bool = False,
) -> jax.Array:
  """`attend_blocked`, for the rows and heads that a device has; nothing travels.

  Args:
    query: [B, T, H, K].
    key: [B, S, G, K]; G divides H.
    value: [B, S, G, V].
    seen: which key each query may see.
    rules: how activations lie on the mesh that is set.
    scale: factor on the scores.
    window: (size, n): see `attend_blocked`.
    in_order: promises that key s is the token of query s; see `attend_blocked`.

  Returns:
    [B, T, H, V] in the dtype of `value`.
  """
  attend = functools.partial(attend_blocked, scale=scale, window=window, in_order=in_order)
  groups = key.shape[2]
  # A key of all heads is whole on every device.
  parts = own_parts(rules, query.shape[0], query.shape[2] if groups == 1 else groups)
  if parts is None:
    return attend(query, key, value, seen)
  own = parts.spec(heads_at=2)
  keys = parts.spec() if groups == 1 else own
  facts = jax.tree.map(lambda x: parts.spec(), seen)
  return parts.run(attend, (own, keys, keys, facts), own)(query, key, value, seen)


def attend_chosen_sharded(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array | int,
  sets: KeySets,
  rules: Rules,
  *,
  scale: float,
  extras: Extras = NONE,
  mass: bool = False,
) -> Selected:
  """`attend_selected` or `attend_blocks`, for the rows and heads that a device has.

  Keys and who chose what are whole on the devices that share a row; of `mass`, a sum over heads,
  each makes the part of its heads, and these are summed.

  Args:
    query: [B, T, H, K].
    key: [B, S, K], one for all heads, or [B, S, H, K].
    value: like the key, or V; see `attend_selected`.
    sets: the keys of each block; of each query where `seen` is None.
    rules: how activations lie on the mesh that is set.
    scale: factor on the scores.
    extras: bias of each key and sink of each head, where there are any.
    mass: whether to return the weights of the chosen keys.

  Returns:
    [B, T, H, V], and [B, T, m] float32 or None.
  """
  parts = own_parts(rules, query.shape[0], query.shape[2])
  channels = value if isinstance(value, int) else None

  def attend(query, key, value, extras, indices, seen):
    value = channels if value is None else value
    options = {'scale': scale, 'mass': mass, **extras._asdict()}
    if seen is None:
      found = attend_selected(query, key, value, indices, **options)
    else:
      found = attend_blocks(query, key, value, KeySets(indices, sets.block, seen), **options)
    if parts is None or not parts.heads or found.mass is None:
      return found
    return found._replace(mass=jax.lax.psum(jax.lax.stop_gradient(found.mass), parts.heads))

  given = None if channels else value
  arrays = (query, key, given, extras, sets.indices, sets.seen)
  if parts is None:
    return attend(*arrays)
  whole, own = parts.spec(), parts.spec(heads_at=2)
  keys = own if key.ndim == 4 else whole
  added = Extras(
    None if extras.key_bias is None else whole,  # type: ignore[arg-type]
    None if extras.sinks is None else PartitionSpec(parts.heads or None),  # type: ignore[arg-type]
  )
  facts = jax.tree.map(lambda x: whole, arrays[4:])
  outs = Selected(own, whole if mass else None)  # type: ignore[arg-type]
  ins = (own, keys, None if channels else keys, added, *facts)
  return parts.run(attend, ins, outs)(*arrays)


def attend_groups_sharded(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  indices: jax.Array,
  rules: Rules,
  *,
  scale: float,
) -> jax.Array:
  """`attend_selected` of groups of heads that choose for themselves, on a mesh of several devices.

  Args:
    query: [B, T, H, K].
    key: [B, S, G, K]; G divides H.
    value: [B, S, G, V].
    indices: [B, T, G, m] int32, no key twice in a row; -1 is none.
    rules: how activations lie on the mesh that is set.
    scale: factor on the scores.

  Returns:
    [B, T, H, V].
  """

  def attend(query, key, value, indices):
    # A group is a row of the batch.
    batch, length, groups = indices.shape[:3]
    rows = query.reshape(batch, length, groups, -1, query.shape[-1])
    q, k, v, i = (
      jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], *x.shape[3:])
      for x in (rows, key, value, indices)
    )
    out = attend_selected(q, k, v, i, scale=scale).out
    out = jnp.moveaxis(out.reshape(batch, groups, *out.shape[1:]), 1, 2)
    return out.reshape(*query.shape[:3], -1)

  parts = own_parts(rules, query.shape[0], key.shape[2])
  if parts is None:
    return attend(query, key, value, indices)
  own = parts.spec(heads_at=2)
  return parts.run(attend, (own,) * 4, own)(query, key, value, indices)
