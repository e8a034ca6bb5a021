"""Attention of a sequence that devices share: what each does with its own tokens.

Everything that comes from other devices comes by what is written here and in `ops.attention.ring`
and `ops.attention.neighbours`: a kind says what it needs, not how it travels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from deepseek_jax.layers.attention.shards import own_parts
from deepseek_jax.layers.context import Context, sequence_devices
from deepseek_jax.layers.context_parallel import Partitioned, restore
from deepseek_jax.ops.attention.blocks import Window
from deepseek_jax.ops.attention.neighbours import attend_window
from deepseek_jax.ops.attention.reference import Seen
from deepseek_jax.ops.attention.ring import Keys, gather


def attend_spread(
  query: jax.Array,
  keys: Keys,
  context: Context,
  *,
  scale: float,
  window: Window | None = None,
) -> jax.Array | None:
  """Attends from tokens to those before them, where devices share the row.

  Args:
    query: [B, T, H, K].
    keys: what the keys of the same tokens are made of: arrays [B, T, C], the same for all heads, or
      [B, T, G, …]; weights are [C, H, …].
    context: facts about the tokens.
    scale: factor on the scores.
    window: see `ops.attention.neighbours.attend_window`; None for all.

  Returns:
    [B, T, H, V]; None where no devices share the row.
  """
  axes, parallel = context.sequence_axes, context.parallel
  if not axes or isinstance(parallel, Partitioned):
    return None
  grouped = [x.shape[2] for x in jax.tree.leaves(keys.source) if x.ndim == 4]
  parts = own_parts(context.rules, query.shape[0], min([query.shape[2], *grouped]), axes)
  assert parts is not None

  def attend(query, source, weights, seen):
    own = keys._replace(source=source, weights=weights)
    if window is not None:
      return attend_window(query, own, seen, scale=scale, window=window, axes=axes)
    return parallel.attend(query, own, seen, scale=scale, axes=axes)

  of_heads = parts.spec(heads_at=2)
  source = jax.tree.map(lambda x: of_heads if x.ndim == 4 else parts.spec(), keys.source)
  weights = jax.tree.map(lambda x: PartitionSpec(None, parts.heads or None), keys.weights)
  seen = context.own()
  facts = jax.tree.map(lambda x: parts.spec(), seen)
  ins = (of_heads, source, weights, facts)
  return parts.run(attend, ins, of_heads)(query, keys.source, keys.weights, seen)


class Whole(NamedTuple):
  """What every device has that shares a row.

  Attributes:
    weights: arrays that are the same for all rows.
    tables: arrays [B, …] of each row.
  """

  weights: Any = ()
  tables: Any = ()


def with_all_keys(
  function: Callable[[Any, Any, Whole], Any],
  own: Any,
  keys: Any,
  whole: Whole,
  context: Context,
  axes: tuple[str, ...] | None = None,
) -> Any:
  """Runs a function of some tokens and of keys of the whole row, on each device for its tokens.

  Keys are gathered, and put in the order of the row, so that numbers of keys, and which of two that
  tie comes first, are those of one device; their gradients are summed where they came from. Rows
  and heads stay with the compiler, or with whatever the function calls.

  Args:
    function: (own, keys, whole) -> arrays [B, T, …].
    own: arrays [B, T, …] of tokens, or [B, N, …] of blocks of neighbouring tokens.
    keys: arrays [B, S, …]; the function gets those of all devices.
    whole: what else it needs.
    context: facts about the tokens.
    axes: mesh axes that share the row; None takes the context's.

  Returns:
    What the function does.
  """
  axes = context.sequence_axes if axes is None else axes
  if not axes:
    return function(own, keys, whole)
  order, devices = context.parallel.order, sequence_devices(context.rules)

  def run(own, keys, whole):
    keys = jax.tree.map(lambda x: restore(x, order, devices), gather(keys, axes))
    return function(own, keys, whole)

  return over_sequence(run, context, axes)(own, keys, whole)


def over_sequence(
  function: Callable[..., Any], context: Context, axes: tuple[str, ...]
) -> Callable[..., Any]:
  """Maps `function(own, keys, whole)` over the devices that share rows, and tokens of a row.

  Arrays [B, T, …] of the first two and of the result are cut along both.

  Args:
    function: of what one device has.
    context: facts about the tokens.
    axes: mesh axes that share a row.
  """
  # Rows too: the compiler cannot partition every gather inside when they are left to it.
  rows = context.row_axes
  tokens = PartitionSpec(rows or None, axes)
  whole = Whole(PartitionSpec(), PartitionSpec(rows or None))
  return jax.shard_map(
    function,
    in_specs=(tokens, tokens, whole),
    out_specs=tokens,
    axis_names={*rows, *axes},
    check_vma=False,
  )


def query_facts(seen: Seen) -> tuple[Any, Any]:
  """Returns what `seen` says of queries: positions and segments [B, T]."""
  return seen.query_positions, seen.query_segments


def key_facts(seen: Seen) -> tuple[Any, Any]:
  """Returns what `seen` says of keys: positions and segments [B, S]."""
  return seen.key_positions, seen.key_segments


def seen_of(queries: tuple[Any, Any], keys: tuple[Any, Any]) -> Seen:
  """Says who sees whom: the inverse of `query_facts` and `key_facts`, [B, T] and [B, S]."""
  return Seen(queries[0], keys[0], queries[1], keys[1])


def choose_spread(
  select: Callable[..., jax.Array], queries: Any, keys: Any, seen: Seen, context: Context
) -> jax.Array:
  """Chooses keys of the whole row for the queries of each device.

  Args:
    select: (queries, keys, seen, ordered) -> [B, T, k] int32; `ordered` says whether the keys are
      the queries' own tokens in the same order.
    queries: arrays [B, T, …], or [B, N, …] of one query a block.
    keys: arrays [B, S, …].
    seen: who sees whom.
    context: facts about the tokens.

  Returns:
    [B, T, k] int32: numbers of keys in the order of the row.
  """
  ordered = not context.sequence_axes

  def run(own, keys, whole):
    del whole
    return select(own[0], keys[0], seen_of(own[1], keys[1]), ordered)

  own, keys = (queries, query_facts(seen)), (keys, key_facts(seen))
  return with_all_keys(run, own, keys, Whole(), context)
