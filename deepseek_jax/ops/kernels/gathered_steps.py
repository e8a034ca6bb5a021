"""The steps of a TPU's kernels for attention to chosen keys.

A kernel runs over the sets of a step of the grid and over the tiles of their keys. Its references
go by name: those of arrays, results and scratch memory that `gathered_tpu` hands it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_jax.ops.attention.blocks import FLOOR
from deepseek_jax.ops.attention.reference import MASKED
from deepseek_jax.ops.kernels.gathered_plan import LANES, TILE, Call, Cut, Piece, Row

UNROLL = 32
"""Rows that are moved between two looks at a loop's counter."""


def forward_kernel(names: tuple[str, ...], call: Call, *refs: Any) -> None:
  """Writes outputs, log-sums and, where asked for, the keys' weights.

  Args:
    names: of the references.
    call: what is static.
    *refs: of all arrays.
  """
  r, cut, row = dict(zip(names, refs)), call.cut, call.row
  scale = call.form.scale

  def begin(number):
    del number
    r['sum'][...] = jnp.zeros(r['sum'].shape, jnp.float32)
    if 'sinks' in r:
      r['top'][...] = r['sinks'][...]
      r['total'][...] = jnp.ones(r['total'].shape, jnp.float32)
    else:
      r['top'][...] = jnp.full(r['top'].shape, FLOOR, jnp.float32)
      r['total'][...] = jnp.zeros(r['total'].shape, jnp.float32)

  def visit(number, tile, slot):
    hidden = _hidden(r, call, number, tile)

    def one(group, _):
      keys = _unpack(r['buffer'], call, slot, group)
      scores = _add(_scores(r['query'][number, group], keys, row) * scale, hidden, cut)
      if call.form.mass:
        r['kept'][tile, group] = scores
      top = r['top'][group]
      higher = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
      weights, factor = jnp.exp(scores - higher), jnp.exp(top - higher)
      r['top'][group] = higher
      r['total'][group] = r['total'][group] * factor + jnp.sum(weights, axis=1, keepdims=True)
      weights = weights.astype(r['query'].dtype)
      for piece in row.values:
        values = _product(weights, _of(keys, piece), 1, 0)
        lanes = piece.lanes
        r['sum'][group, :, lanes] = r['sum'][group, :, lanes] * factor + values

    _each(cut.groups, one)

  def finish(number):
    def one(group, _):
      total = r['total'][group]
      some = total > 0
      whole = jnp.where(some, total, 1.0)
      r['out'][number, group] = (r['sum'][group] / whole).astype(r['out'].dtype)
      r['log_sum'][number, group] = jnp.where(some, r['top'][group] + jnp.log(whole), 0.0)

    _each(cut.groups, one)
    if call.form.mass:
      lax.fori_loop(0, cut.tiles, lambda tile, _: weigh(number, tile), None)

  def weigh(number, tile):
    def add(group, sums):
      weights = jnp.exp(r['kept'][tile, group] - r['log_sum'][number, group])
      if cut.share == 1:
        return sums + weights
      if cut.queries == 1:
        return sums + jnp.sum(weights, axis=0, keepdims=True)
      return sums + jnp.sum(weights.reshape(cut.queries, cut.share, TILE), axis=1)

    sums = lax.fori_loop(0, cut.groups, add, jnp.zeros((cut.queries, TILE), jnp.float32))
    sums = jnp.where(tile < r['counts'][0, number], sums, 0.0)
    r['mass'][number, :, _lanes(tile * TILE, TILE)] = sums

  _visit_tiles(r, call, begin, visit, finish)


def backward_kernel(names: tuple[str, ...], call: Call, *refs: Any) -> None:
  """Writes the queries' gradients; that of the keys stays in VMEM until all sets have added to it.

  Args:
    names: of the references.
    call: what is static.
    *refs: of all arrays.
  """
  r, cut, row = dict(zip(names, refs)), call.cut, call.row
  scale = call.form.scale
  batch, chunk, step = (pl.program_id(axis) for axis in range(3))

  @pl.when(step == 0)
  def clear():
    def some(number, _):
      r['whole'][pl.ds(number * 8, 8)] = jnp.zeros((8, *r['whole'].shape[1:]), jnp.float32)

    lax.fori_loop(0, r['whole'].shape[0] // 8, some, None)

  def begin(number):
    del number
    r['sum'][...] = jnp.zeros(r['sum'].shape, jnp.float32)

  def visit(number, tile, slot):
    hidden = _hidden(r, call, number, tile)

    def one(group, bias):
      keys = _unpack(r['buffer'], call, slot, group)
      query, grad = r['query'][number, group], r['grad'][number, group]
      sums = r['sums'][number, group]
      scores = _add(_scores(query, keys, row) * scale, hidden, cut)
      weights = jnp.exp(scores - sums[:, :1])
      pulls = [_product(grad[:, x.lanes], _of(keys, x), 1, 1) for x in row.values]
      change = weights * (functools.reduce(jnp.add, pulls) - sums[:, 1:])
      if call.biased:
        ones = jnp.ones((cut.rows, LANES), jnp.float32)
        bias = bias + _product(change, ones, 0, 0, lax.Precision.HIGHEST)
      flat = (change * scale).astype(query.dtype)
      weights = weights.astype(grad.dtype)
      to_rows = {x.lanes.start: _product(weights, grad[:, x.lanes], 0, 0) for x in row.values}
      for own, piece in row.keys:
        r['sum'][group, :, own] += _product(flat, _of(keys, piece), 1, 0)
        to_key = _product(flat, query[:, own], 0, 0)
        at = piece.lanes.start
        to_rows[at] = to_rows[at] + to_key if at in to_rows else to_key
      for at, x in to_rows.items():
        _store(r['part'], group * row.lanes + at, x)
      return bias

    bias = _each(cut.groups, one, jnp.zeros((TILE, LANES), jnp.float32) if call.biased else None)
    if call.biased:
      _store(r['part'], r['part'].shape[-1] - LANES, bias)
    first = (number * cut.tiles + tile) * TILE

    def add(place, _):
      slot = r['places'][0, first + place]
      r['whole'][slot] = r['whole'][slot] + r['part'][place]

    lax.fori_loop(0, TILE, add, None, unroll=UNROLL)

  def finish(number):
    def one(group, _):
      r['to_query'][number, group] = r['sum'][group].astype(r['to_query'].dtype)

    _each(cut.groups, one)

  _visit_tiles(r, call, begin, visit, finish)

  @pl.when(step == pl.num_programs(2) - 1)
  def write():
    copy = pltpu.make_async_copy(r['whole'], r['to_rows'].at[batch, chunk], r['done'])
    copy.start()
    copy.wait()


def _visit_tiles(r: dict[str, Any], call: Call, begin, visit, finish) -> None:
  """Runs over the sets of a step and their tiles; each tile is fetched while the last is used."""
  cut = call.cut
  batch, chunk, wide = pl.program_id(0), pl.program_id(1), cut.groups * call.row.width

  def where(at):
    # Of numbers that are not negative, so that signs need not be looked at.
    return lax.div(at, cut.tiles), lax.rem(at, cut.tiles), lax.rem(at, 2)

  def needed(at):
    number, tile, _ = where(at)
    return tile < r['counts'][0, number]

  def fetch(at):
    slot = where(at)[2]

    def some(number, _):
      # All reads before the first write: none is moved past a write.
      first = number * UNROLL
      places = [r['places'][0, at * TILE + first + n] for n in range(UNROLL)]
      if cut.resident:
        for n, row in enumerate([r['rows'][place] for place in places]):
          r['buffer'][slot, first + n] = row
        return
      for n, place in enumerate(places):
        source = r['rows'].at[batch, place]
        if cut.chunks > 1:
          source = source.at[:, _lanes(chunk * wide, wide)]
        target = r['buffer'].at[slot, first + n]
        pltpu.make_async_copy(source, target, r['arrived'].at[slot]).start()

    pl.when(needed(at))(lambda: lax.fori_loop(0, TILE // UNROLL, some, None))

  def use(at):
    number, tile, slot = where(at)
    if not cut.resident:
      # One wait for all rows of the tile: the semaphore counts bytes.
      rows = r['buffer'].at[slot]
      pltpu.make_async_copy(rows, rows, r['arrived'].at[slot]).wait()
    visit(number, tile, slot)

  def step(at, _):
    number, tile = where(at)[:2]
    pl.when(at + 1 < cut.sets * cut.tiles)(lambda: fetch(at + 1))
    pl.when(tile == 0)(lambda: begin(number))
    pl.when(needed(at))(lambda: use(at))
    pl.when(tile == cut.tiles - 1)(lambda: finish(number))

  fetch(jnp.int32(0))
  lax.fori_loop(0, cut.sets * cut.tiles, step, None)


def _each(count: int, one: Callable[[Any, Any], Any], carry: Any = None) -> Any:
  """Runs `one` for each group."""
  return one(0, carry) if count == 1 else lax.fori_loop(0, count, one, carry)


def _lanes(start: Any, size: int) -> Any:
  """A slice of whole vectors."""
  if isinstance(start, int):
    return slice(start, start + size)
  return pl.ds(pl.multiple_of(start, LANES), size)


def _hidden(r: dict[str, Any], call: Call, number: Any, tile: Any) -> jax.Array:
  """What is added to the scores of a tile, [1, TILE] or [queries, TILE] float32."""
  lanes = _lanes(tile * TILE, TILE)
  places = r['key_facts'][number, 0:1, lanes]
  seen = places >= 0
  if 'query_facts' in r:
    own = r['query_facts'][number]
    seen &= places <= own[:, 0:1]
    if call.segments:
      seen &= r['key_facts'][number, 1:2, lanes] == own[:, 1:2]
  hidden = jnp.where(seen, 0.0, MASKED)
  if call.biased:
    last = r['key_facts'].shape[1] - 1
    hidden += lax.bitcast_convert_type(r['key_facts'][number, last:, lanes], jnp.float32)
  return hidden


def _add(scores: jax.Array, hidden: jax.Array, cut: Cut) -> jax.Array:
  """Adds what hides keys from queries to the scores of every head."""
  if cut.share == 1 or hidden.shape[0] == 1:
    return scores + hidden
  scores = scores.reshape(cut.queries, cut.share, TILE) + hidden[:, None]
  return scores.reshape(cut.rows, TILE)


def _vectors(rows: Any, first: Any, lanes: int) -> tuple[Any, list[Any]]:
  """A view of rows [TILE, 1, W] by vectors, and where the vectors are that hold some lanes.

  Each row is in memory as it came, one vector after another. Read with a stride, one vector of
  every row is a matrix [TILE, LANES] as the products want it.
  """
  stride = rows.shape[-1] // LANES
  first = first // LANES if isinstance(first, int) else lax.div(first, LANES)
  places = [pl.ds(first + n, TILE, stride=stride) for n in range(lanes // LANES)]
  return rows.reshape(TILE * stride, LANES), places


def _store(rows: Any, first: Any, x: jax.Array) -> None:
  """Writes lanes of rows [TILE, 1, W] from `first` on; `x` is [TILE, lanes]."""
  view, places = _vectors(rows, first, x.shape[1])
  for n, place in enumerate(places):
    view[place, :] = x[:, n * LANES : (n + 1) * LANES]


def _unpack(buffer: Any, call: Call, slot: Any, group: Any) -> list[list[jax.Array]]:
  """The vectors [TILE, LANES] of each part of a group's rows."""
  row = call.row
  view, places = _vectors(buffer.at[slot], group * row.width, row.width)
  words = [view[place, :] for place in places]
  if row.parts == 1:
    return [words]
  low = [lax.bitcast_convert_type(x << 16, jnp.float32) for x in words]
  high = [lax.bitcast_convert_type(x & -65536, jnp.float32) for x in words]
  return [[x.astype(jnp.bfloat16) for x in part] for part in (low, high)]


def _of(keys: list[list[jax.Array]], piece: Piece) -> jax.Array:
  """A piece [TILE, lanes] of rows."""
  first, last = piece.words.start // LANES, piece.words.stop // LANES
  return jnp.concatenate(keys[piece.part][first:last], axis=1)


def _scores(query: jax.Array, keys: list[list[jax.Array]], row: Row) -> jax.Array:
  """Products of queries [X, key lanes] and keys, [X, TILE] float32."""
  products = [_product(query[:, own], _of(keys, piece), 1, 1) for own, piece in row.keys]
  return functools.reduce(jnp.add, products)


def _product(a: jax.Array, b: jax.Array, left: int, right: int, precision: Any = None) -> jax.Array:
  """Sums over axis `left` of a and `right` of b, in float32."""
  axes = (((left,), (right,)), ((), ()))
  return lax.dot_general(a, b, axes, precision, jnp.float32)
