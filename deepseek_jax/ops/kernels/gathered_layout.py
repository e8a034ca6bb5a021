"""How attention to chosen keys is laid out for a TPU's kernels, as `gathered_plan` says.

A row of keys and values is whole in memory, in words of 32 bits, so that one copy moves it.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.attention.reference import Seen
from deepseek_jax.ops.kernels.gathered_plan import TILE, Call, Cut, Piece


def numbers(call: Call, indices: jax.Array) -> dict[str, jax.Array]:
  """Returns what the sets [B, N, m] name, as scalars of each step.

  Returns:
    `places` [B, steps, 1, g · m] int32, the first row where there is none; and `counts`
    [B, steps, 1, g] int32, how many tiles of each set have to be visited.
  """
  cut, found = call.cut, _of_sets(call.cut, indices, -1)
  last = jnp.max(jnp.where(found >= 0, jnp.arange(1, found.shape[2] + 1), 0), axis=-1)
  counts = -(-last // TILE)
  shape = (indices.shape[0], cut.steps, 1, -1)
  return {
    'places': jnp.clip(found, 0, call.slots - 1).reshape(shape),
    'counts': counts.astype(jnp.int32).reshape(shape),
  }


def facts_of(call: Call, key_bias, indices, seen: Seen | None) -> dict[str, jax.Array]:
  """Returns what the masks of sets are made of.

  Returns:
    `key_facts` [B, sets, facts, m] int32: position or -1, segment and the bits of the bias, as far
    as there are such; and `query_facts` [B, sets, Q, 2] int32: position and segment.
  """
  cut = call.cut
  safe = jnp.clip(indices, 0, call.slots - 1)
  pick = lambda x: jax.vmap(lambda x, i: x[i])(x, safe)  # noqa: E731
  found, facts = {}, [_of_sets(cut, indices, -1)]
  if seen is not None:
    facts = [_of_sets(cut, jnp.where(indices >= 0, pick(seen.key_positions), -1), -1)]
    own = [seen.query_positions]
    if seen.query_segments is not None and seen.key_segments is not None:
      facts.append(_of_sets(cut, pick(seen.key_segments), 0))
      own.append(seen.query_segments)
    queries = jnp.stack(own, axis=-1).astype(jnp.int32)
    queries = queries.reshape(queries.shape[0], -1, cut.queries, queries.shape[-1])
    # A query that only fills up is at position -1 and sees none.
    more = ((0, 0), (0, cut.steps * cut.sets - queries.shape[1]), (0, 0), (0, 0))
    found['query_facts'] = jnp.pad(queries, more, constant_values=-1)
  if key_bias is not None:
    bits = lax.bitcast_convert_type(key_bias.astype(jnp.float32), jnp.int32)
    facts.append(_of_sets(cut, pick(bits), 0))
  return {'key_facts': jnp.stack(facts, axis=2).astype(jnp.int32), **found}


def _of_sets(cut: Cut, x: jax.Array, fill: int) -> jax.Array:
  """[B, N, m] -> one for each piece of a set, filled up to whole tiles and steps."""
  x = jnp.repeat(x, cut.repeat, axis=1) if cut.repeat > 1 else x
  sets, keys = cut.steps * cut.sets, cut.tiles * TILE
  more = ((0, 0), (0, sets - x.shape[1]), (0, keys - x.shape[2]))
  return jnp.pad(x, more, constant_values=fill)


def to_heads(call: Call, x: jax.Array) -> jax.Array:
  """[B, T, H, …] -> [B, sets, G, Q · R, …]."""
  cut, batch = call.cut, x.shape[0]
  groups = cut.groups * cut.chunks
  x = x.reshape(batch, -1, cut.queries, groups, cut.share, *x.shape[3:])
  x = jnp.moveaxis(x, 3, 2)
  more = [(0, 0)] * x.ndim
  more[1] = (0, cut.steps * cut.sets - x.shape[1])
  x = jnp.pad(x, more)
  return x.reshape(*x.shape[:3], cut.rows, *x.shape[5:])


def to_tokens(call: Call, x: jax.Array) -> jax.Array:
  """[B, sets, G, Q · R, …] -> [B, T, H, …] with the queries that fill up the last step."""
  cut, (batch, sets, groups) = call.cut, x.shape[:3]
  x = x.reshape(batch, sets, groups, cut.queries, cut.share, *x.shape[4:])
  x = jnp.moveaxis(x, 2, 3)
  return x.reshape(batch, sets * cut.queries, groups * cut.share, *x.shape[5:])


def lay_queries(call: Call, query: jax.Array) -> jax.Array:
  """[B, T, H, K] -> [B, sets, G, X, key lanes]."""
  row, size = call.row, call.form.value[1]
  if not row.shared or _full(row.values, size):
    return to_heads(call, _spread(query, [piece for _, piece in row.keys]))
  pair = _spread(query[..., :size], row.values), _spread(query[..., size:], row.others)
  return to_heads(call, jnp.concatenate(pair, axis=-1))


def lay_values(call: Call, x: jax.Array) -> jax.Array:
  """[B, T, H, V] -> [B, sets, G, X, parts · out]."""
  return to_heads(call, _spread(x, call.row.values))


def lay_rows(call: Call, rows: jax.Array) -> jax.Array:
  """[B, G, S, W] -> words [B, S, 1, G · width]: a row is whole, wherever it begins."""
  row, form = call.row, call.form
  first, size = form.value
  value = rows[..., first : first + size]
  rest = rows[..., size : form.key] if row.shared else rows[..., : form.key]
  pieces = row.values + row.others
  found = _apart(value, row.values) + _apart(rest, row.others)
  parts = []
  for part in range(row.parts):
    own = [_filled(*pair) for pair in zip(found, pieces, strict=True) if pair[1].part == part]
    parts.append(_fill(jnp.concatenate(own, axis=-1), row.width))
  words = parts[0]
  if row.parts > 1:
    low, high = (lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) for x in parts)
    words = lax.bitcast_convert_type(low | (high << 16), jnp.int32)
  return jnp.moveaxis(words, 1, 2).reshape(rows.shape[0], rows.shape[2], 1, -1)


def taken(x: jax.Array, pieces: list[Piece], first: int = 0) -> jax.Array:
  """Returns the channels [..., C] of pieces that are side by side [..., lanes] after `first`."""
  if not pieces:
    return x[..., :0]
  start, count = pieces[0].lanes.start - first, sum(piece.channels for piece in pieces)
  if _full(pieces, count):
    return x[..., start : start + count]
  starts = [(piece.lanes.start - first, piece.channels) for piece in pieces]
  return jnp.concatenate([x[..., at : at + count] for at, count in starts], axis=-1)


def taken_keys(call: Call, x: jax.Array) -> jax.Array:
  """Returns the channels [..., K] of keys that begin with their values from [..., lanes]."""
  row, size = call.row, call.form.value[1]
  if _full(row.values, size):
    return taken(x, row.values + row.others)
  pair = taken(x, row.values)[..., :size], taken(x, row.others)
  return jnp.concatenate(pair, axis=-1)


def _full(pieces: list[Piece], channels: int) -> bool:
  """Whether channels are in order in pieces side by side, with nothing between them."""
  whole = all(p.channels == p.lanes.stop - p.lanes.start for p in pieces[:-1])
  return whole and channels == sum(piece.channels for piece in pieces)


def _spread(x: jax.Array, pieces: list[Piece]) -> jax.Array:
  """[..., C] -> pieces side by side [..., lanes]."""
  if not pieces:
    return x[..., :0]
  if _full(pieces, x.shape[-1]):
    return _fill(x, pieces[-1].lanes.stop - pieces[0].lanes.start)
  filled = [_filled(*pair) for pair in zip(_apart(x, pieces), pieces, strict=True)]
  return jnp.concatenate(filled, axis=-1)


def _apart(x: jax.Array, pieces: list[Piece]) -> list[jax.Array]:
  """Cuts channels [..., C] into those of each piece."""
  edges = [0, *itertools.accumulate(piece.channels for piece in pieces)]
  return [x[..., first:last] for first, last in itertools.pairwise(edges)]


def _filled(x: jax.Array, piece: Piece) -> jax.Array:
  """Fills the channels of a piece up to whole vectors."""
  return _fill(x, piece.lanes.stop - piece.lanes.start)


def _fill(x: jax.Array, lanes: int) -> jax.Array:
  """Lengthens the last axis with zeros."""
  more = [(0, 0)] * (x.ndim - 1)
  return jnp.pad(x, [*more, (0, lanes - x.shape[-1])])
