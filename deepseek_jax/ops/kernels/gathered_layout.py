"""How attention to chosen keys is laid out for a TPU's kernels, and cut into steps that fit there.

A row of keys and values is whole in memory, in words of 32 bits, so that one copy moves it.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from deepseek_jax.ops.attention.gathered_loop import Form
from deepseek_jax.ops.attention.reference import Seen

LANES = 128
"""Width of the chip's vectors."""
TILE = 128
"""Keys that are fetched together and multiplied at once."""
STEP = 4096
"""Keys that a step of the grid visits, if sets are smaller: only its first tile is waited for."""
SETS = 16
"""Most sets of a step of the grid."""
MEMORY = 64 << 20
"""Bytes of VMEM that a chip has unless it says otherwise: v5p has them, v5e and v6e twice that."""
SHARE = 0.7
"""Part of VMEM that the arrays of a kernel may fill; products need room too."""


class Piece(NamedTuple):
  """Whole vectors of a row of which a part of its words has the channels.

  Attributes:
    part: which numbers of the words.
    words: where these words are.
    lanes: where the channels are if all pieces are put side by side.
    channels: how many channels there are.
  """

  part: int
  words: slice
  lanes: slice
  channels: int


class Row(NamedTuple):
  """How the channels of a row are laid out in words of 32 bits, for one group of heads.

  Two bfloat16 numbers share a word: a row has two parts, whose words are the same. Each has its
  share of the value; what is key alone fills up the words of the first part, then of the second.

  Attributes:
    value: channels of the value in a part.
    rests: channels in each part that are key alone.
    shared: whether the value is key too.
  """

  value: int
  rests: tuple[int, ...]
  shared: bool

  @property
  def parts(self) -> int:
    """Numbers of a word."""
    return len(self.rests)

  @property
  def out(self) -> int:
    """Words of a value."""
    return round_up(self.value, LANES)

  @property
  def width(self) -> int:
    """Words of a row."""
    return self.out + round_up(self.rests[0], LANES)

  @property
  def values(self) -> list[Piece]:
    """The pieces of the value."""
    places = [slice(part * self.out, (part + 1) * self.out) for part in range(self.parts)]
    return [Piece(n, slice(0, self.out), lanes, self.value) for n, lanes in enumerate(places)]

  @property
  def others(self) -> list[Piece]:
    """The pieces of what is key alone."""
    found, at = [], self.parts * self.out
    for part, count in enumerate(self.rests):
      size = round_up(count, LANES)
      words, lanes = slice(self.out, self.out + size), slice(at, at + size)
      found += [Piece(part, words, lanes, count)] if count else []
      at += size
    return found

  @property
  def keys(self) -> list[tuple[slice, Piece]]:
    """The pieces that are multiplied as keys, and where in a query their counterparts are."""
    pieces = self.values + self.others if self.shared else self.others
    first = pieces[0].lanes.start
    return [(slice(x.lanes.start - first, x.lanes.stop - first), x) for x in pieces]

  @property
  def key(self) -> int:
    """Lanes of a query."""
    return self.keys[-1][0].stop

  @property
  def lanes(self) -> int:
    """Lanes of all pieces side by side."""
    return (self.values + self.others)[-1].lanes.stop


class Cut(NamedTuple):
  """How a call is cut into steps of the grid.

  Attributes:
    repeat: pieces that the queries of a set are cut into; each fetches the keys for itself.
    queries: queries Q of a piece.
    share: heads R of a group.
    sets: sets g of a step.
    steps: steps that all sets of a row of the batch take.
    groups: groups of heads of a step.
    chunks: steps that all groups take.
    tiles: tiles of keys of a set.
    resident: whether all rows of the batch's row are in VMEM, and tiles are made of them there.
  """

  repeat: int
  queries: int
  share: int
  sets: int
  steps: int
  groups: int
  chunks: int
  tiles: int
  resident: bool

  @property
  def rows(self) -> int:
    """Rows X of the scores of a group and a set: its queries, each with all heads."""
    return self.queries * self.share


class Call(NamedTuple):
  """All that is static in a kernel.

  Attributes:
    form: what is static in the call of attention.
    row: how a row is laid out.
    cut: how the call is cut.
    slots: keys S of a row of the batch.
    segments: whether the queries of a set see keys of their segment alone.
    biased: whether scores have a bias.
  """

  form: Form
  row: Row
  cut: Cut
  slots: int
  segments: bool
  biased: bool


def lay_out(form: Form, dtype: Any) -> Row:
  """Returns how the rows of a call are laid out."""
  parts = 4 // jnp.dtype(dtype).itemsize
  first, size = form.value
  rest = form.key - size if first == 0 else form.key
  # As few words as hold it in all parts, and of these the first part has as much as goes in.
  room = round_up(-(-rest // parts), LANES)
  rests = (min(rest, room), max(rest - room, 0))[:parts]
  return Row(-(-size // parts), rests, first == 0)


def cut_up(
  form: Form, query: jax.Array, rows: jax.Array, indices: jax.Array, backward: bool
) -> Cut | None:
  """Returns the largest steps whose arrays fit into VMEM, or None where none do.

  Args:
    form: what is static in the call of attention.
    query: [B, T, H, K], whose sizes are looked at alone, as those of the others are.
    rows: [B, G, S, W].
    indices: [B, N, m].
    backward: whether it is for the gradient.
  """
  row, (_, groups, slots, _) = lay_out(form, rows.dtype), rows.shape
  tiles = -(-indices.shape[2] // TILE)
  pieces = [n for n in range(1, form.block + 1) if form.block % (8 * n) == 0] or [1]
  limit = int(SHARE * memory())
  divisors = [n for n in range(1, groups + 1) if groups % n == 0]
  for resident, chunks, repeat in itertools.product((True, False), divisors, pieces):
    count = indices.shape[1] * repeat
    most = min(SETS, max(STEP // (tiles * TILE), 1), count) if repeat == 1 else 1
    while most:
      sets = _even(count, most)
      cut = Cut(
        repeat=repeat,
        queries=form.block // repeat,
        share=query.shape[2] // groups,
        sets=sets,
        steps=-(-count // sets),
        groups=groups // chunks,
        chunks=chunks,
        tiles=tiles,
        resident=resident,
      )
      if vmem_bytes(form, row, cut, slots, rows.dtype.itemsize, backward) <= limit:
        return cut
      most //= 2
  return None


def _even(count: int, most: int) -> int:
  """Returns a divisor of `count`, so that nothing need be filled up, unless they are small."""
  divisor = max(n for n in range(1, most + 1) if count % n == 0)
  return divisor if 2 * divisor > most else most


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


def memory() -> int:
  """Bytes of VMEM of the chip that is here, or of any that is likely."""
  if jax.default_backend() == 'tpu':
    return pltpu.get_tpu_info().vmem_capacity_bytes
  return MEMORY


def vmem_bytes(form: Form, row: Row, cut: Cut, slots: int, size: int, backward: bool) -> int:
  """VMEM that the arrays of a step take; blocks that are read or written are there twice."""
  x, keys = round_up(cut.rows, 8), cut.tiles * TILE
  pairs = cut.sets * cut.groups * x
  out, column = row.parts * row.out, LANES * 4
  blocks = pairs * (row.key * size + out * size + column)
  blocks += cut.sets * (8 * keys * 4 + round_up(cut.queries, 8) * column)
  held = (2 * TILE + (slots if cut.resident else 0)) * cut.groups * row.width * 4
  held += 4 * x * TILE * 4 + 3 * TILE * row.parts * row.width * 4
  if backward:
    blocks += pairs * row.key * size
    wide = cut.groups * row.lanes + LANES
    held += cut.groups * x * row.key * 4 + x * row.key * 4
    held += (round_up(slots, 8) + 2 * TILE) * wide * 4
  else:
    held += cut.groups * x * (out * 4 + 2 * column) + x * out * 4
    if form.mass:
      blocks += cut.sets * round_up(cut.queries, 8) * keys * 4
      held += cut.groups * x * keys * 4
  return 2 * blocks + held


def round_up(size: int, multiple: int) -> int:
  """Returns the next multiple."""
  return -(-size // multiple) * multiple
