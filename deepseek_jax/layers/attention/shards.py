"""Dense attention where the compiler spreads arrays over devices: each attends for its own part."""

import functools

import jax
from jax.sharding import PartitionSpec

from deepseek_jax.ops.attention.blocked import attend_blocked
from deepseek_jax.ops.attention.blocks import Window
from deepseek_jax.ops.attention.reference import Seen
from deepseek_jax.ops.mesh import arrays_are_whole
from deepseek_jax.sharding.rules import Rules, shard_count


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
  """`attend_blocked`, for the rows and heads that a device has, on a mesh of several.

  Rows and heads know nothing of each other, so nothing travels. Left to itself, the compiler can
  spread neither a kernel nor the blocks that a loop visits. Rows or heads that their devices do not
  divide (one row, in decoding; fewer key heads than devices) are whole on each. Where the sequence
  is spread, the compiler is left to it.

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
  mesh = jax.sharding.get_abstract_mesh()
  sizes = dict(mesh.shape)
  if arrays_are_whole() or shard_count(rules.seq, sizes) > 1:
    return attend(query, key, value, seen)
  free = set(mesh.axis_names) - set(mesh.manual_axes)
  groups = key.shape[2]
  rows, heads = (
    # Inside of another `shard_map` its axes have been dealt with.
    tuple(axis for axis in axes if axis in free) if size % shard_count(axes, sizes) == 0 else ()
    for axes, size in (
      (rules.batch, query.shape[0]),
      # A key of all heads is whole on every device.
      (rules.act_heads, query.shape[2] if groups == 1 else groups),
    )
  )
  own = PartitionSpec(rows or None, None, heads or None)
  keys = PartitionSpec(rows or None) if groups == 1 else own
  facts = jax.tree.map(lambda x: PartitionSpec(rows or None), seen)
  return jax.shard_map(
    attend,
    in_specs=(own, keys, keys, facts),
    out_specs=own,
    axis_names=free,
    check_vma=False,
  )(query, key, value, seen)
