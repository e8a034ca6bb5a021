"""What a device of a shared sequence needs of the tokens before its own.

For use inside of `shard_map`, where an axis of the mesh has a part of the tokens on each device, in
the order of the row. What travels does not grow with the length of the row.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.attention.blocked import attend_blocked
from deepseek_jax.ops.attention.blocks import Window
from deepseek_jax.ops.attention.reference import Seen
from deepseek_jax.ops.attention.ring import Axes, Facts, Keys, gather, own_facts, seen_from


def tokens_before(tree: Any, count: int, axes: Axes) -> Any:
  """Returns the `count` tokens before the device's own of arrays [B, T, …]: [B, count, …].

  Zeros stand before the first token of the row. A neighbour sends no more than is asked for; where
  it has fewer, those before it send too.
  """
  devices = lax.axis_size(axes)

  def before(x: jax.Array) -> jax.Array:
    length, parts, missing = x.shape[1], [x[:, :0]], count
    for hop in range(1, devices):
      if not missing:
        break
      size = min(length, missing)
      pairs = [(place, place + hop) for place in range(devices - hop)]
      parts.insert(0, lax.ppermute(x[:, length - size :], axes, pairs))
      missing -= size
    if missing:
      parts.insert(0, jnp.zeros((x.shape[0], missing, *x.shape[2:]), x.dtype))
    return jnp.concatenate(parts, axis=1)

  with jax.named_scope('tokens_before'):
    return jax.tree.map(before, tree)


def with_tokens_before(tree: Any, facts: Facts, count: int, axes: Axes) -> tuple[Any, Facts]:
  """Puts the `count` tokens before the device's own before arrays [B, T, …] and their facts."""
  before = tokens_before(tree, count, axes), facts_before(facts, count, axes)
  return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), before, (tree, facts))


def facts_before(facts: Facts, count: int, axes: Axes) -> Facts:
  """Returns the facts [B, count] of the tokens before; -1 stands before the first of the row."""
  # What nobody sends is 0.
  return Facts(*(x - 1 for x in tokens_before(Facts(*(x + 1 for x in facts)), count, axes)))


def attend_window(
  query: jax.Array, keys: Keys, seen: Seen, *, scale: float, window: Window, axes: Axes
) -> jax.Array:
  """Attends to the last positions, and to the first of the segment, of which a few travel.

  Args:
    query: [B, T, H, K] of this device.
    keys: of this device.
    seen: who of this device sees whom of it.
    scale: factor on the scores.
    window: (size, n): the last `size` positions up to the query's own, and the positions below n.
    axes: mesh axes that share the sequence.

  Returns:
    [B, T, H, V].
  """
  size, sinks = window
  own = keys.source, own_facts(seen)
  reach = min(size - 1, (lax.axis_size(axes) - 1) * query.shape[1])
  parts = [(tokens_before(own[0], reach, axes), facts_before(own[1], reach, axes)), own]
  if sinks:
    parts.insert(0, first_tokens(*own, sinks, reach, axes))
  source, facts = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)
  key, value = keys.expand(source, keys.weights)
  return attend_blocked(query, key, value, seen_from(seen, facts), scale=scale, window=window)


def first_tokens(
  source: Any, facts: Facts, sinks: int, reach: int, axes: Axes
) -> tuple[Any, Facts]:
  """Returns the first tokens of segments that go on beyond the device where they begin.

  Only the last segment of a device goes on: each has `sinks` tokens to tell, or fewer.

  Args:
    source: arrays [B, T, …].
    facts: of them.
    sinks: positions at the start of a segment that are asked for.
    reach: tokens before the device's own that it has anyway; these are not returned once more.
    axes: mesh axes that share the sequence.

  Returns:
    Arrays [B, devices · sinks, …], and their facts.
  """
  positions, segments = facts
  batch, length = positions.shape
  first = lax.axis_index(axes) * length
  told = (positions >= 0) & (positions < sinks) & (segments == segments[:, -1:])
  rows = jnp.arange(batch)[:, None]
  slots = jnp.where(told, positions, sinks)
  places = jnp.full((batch, sinks), -1, jnp.int32)
  places = places.at[rows, slots].set(jnp.arange(length, dtype=jnp.int32), mode='drop')
  pick = lambda x: jax.vmap(lambda row, i: row[i])(x, jnp.maximum(places, 0))  # noqa: E731
  there = places >= 0
  found = Facts(*(jnp.where(there, pick(x), -1) for x in facts))
  source, found, at = gather((jax.tree.map(pick, source), found, places + first), axes)
  positions = jnp.where(at < first - reach, found.positions, -1)
  return source, Facts(positions, found.segments)
