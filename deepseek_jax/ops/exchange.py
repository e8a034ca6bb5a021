"""Rows of unequal number from every shard to every shard, and back: dropless expert parallelism.

Each of P shards holds rows sorted by expert. The experts lie on the shards in order, E / P on each;
what goes from a shard to an expert is a run of rows. Runs arrive sorted by expert and, within an
expert, by the shard they come from: the rows of an expert lie together, and nothing has to be
sorted again before they are multiplied. All functions here run inside `jax.shard_map`.

On TPU and GPU the runs travel by `jax.lax.ragged_all_to_all`, each as long as it is. XLA has no
such operation for CPU: there, what goes from shard to shard is padded to the longest it may be, and
the padding is thrown away on arrival. Both move rows and compute nothing, so that their results are
the same to the last bit.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

_LANES = 128
"""Numbers in a vector of a TPU."""


class Plan(NamedTuple):
  """Which rows go where; the same on every shard, but for `shard`.

  Attributes:
    start: [P, E] int32, first row, on shard p, of its run for expert e.
    size: [P, E] int32, rows of that run which travel.
    landing: [P, E] int32, first row, on the shard of expert e, of the run that comes from p.
    shard: [] int32, the number of this shard.
  """

  start: jax.Array
  size: jax.Array
  landing: jax.Array
  shard: jax.Array


def plan_exchange(counts: jax.Array, axis: str, room: int) -> Plan:
  """Tells every shard how many rows all the others have for each expert.

  Args:
    counts: [E] int32, rows that this shard has for each expert, sorted by expert.
    axis: the mesh axis of the shards; its size P divides E.
    room: rows that one shard takes. What comes after, in the order of arrival, does not travel.
  """
  every = jax.lax.all_gather(counts, axis)
  shards, experts = every.shape
  # [P from, P to, E / P] -> [P to, E / P · P from], the order of arrival.
  arriving = every.reshape(shards, shards, -1).transpose(1, 2, 0).reshape(shards, experts)
  ends = jnp.minimum(jnp.cumsum(arriving, axis=1), room)
  landing = jnp.pad(ends, ((0, 0), (1, 0)))[:, :-1]

  def by_sender(table):
    return table.reshape(shards, -1, shards).transpose(2, 0, 1).reshape(shards, experts)

  return Plan(
    start=jnp.cumsum(every, axis=1) - every,
    size=by_sender(ends - landing),
    landing=by_sender(landing),
    shard=jax.lax.axis_index(axis),
  )


def received_sizes(plan: Plan) -> jax.Array:
  """Returns the rows [E / P] int32 that each expert of this shard receives."""
  return jnp.sum(_mine(plan.size, plan.shard), axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def ragged_exchange(rows: jax.Array, plan: Plan, axis: str, room: int) -> jax.Array:
  """Sends rows [R, D] to the shards of their experts; the gradient comes back the same way.

  Args:
    rows: [R, D], sorted by expert; rows after the last expert's do not travel.
    plan: of `plan_exchange`, with the same `axis` and `room`.
    axis: the mesh axis of the shards.
    room: rows of the result.

  Returns:
    [room, D], sorted by expert; zero where nothing has arrived.
  """
  return _exchange(rows, plan, axis, room)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def ragged_return(rows: jax.Array, plan: Plan, axis: str, count: int) -> jax.Array:
  """Sends rows [M, D] back to where `ragged_exchange` took them from.

  Args:
    rows: [M, D], in the order of arrival.
    plan: the plan that they came by.
    axis: the mesh axis of the shards.
    count: rows R of the result.

  Returns:
    [R, D]; zero for rows that did not travel.
  """
  return _return(rows, plan, axis, count)


def _exchange(rows, plan, axis, room):
  shards = plan.size.shape[0]
  sent = _Runs(*(table[plan.shard].reshape(shards, -1) for table in plan[:3]))
  return _move(rows, sent, _Runs(*(_mine(table, plan.shard) for table in plan[:3])), axis, room)


def _return(rows, plan, axis, count):
  shards = plan.size.shape[0]
  back = Plan(start=plan.landing, size=plan.size, landing=plan.start, shard=plan.shard)
  sent = _Runs(*(_mine(table, plan.shard) for table in back[:3]))
  own = _Runs(*(table[plan.shard].reshape(shards, -1) for table in back[:3]))
  return _move(rows, sent, own, axis, count)


def _exchange_forward(rows, plan, axis, room):
  return _exchange(rows, plan, axis, room), (plan, jnp.zeros((len(rows), 0)))


def _exchange_backward(axis, room, saved, grad):
  plan, rows = saved
  return _return(grad, plan, axis, len(rows)), None


def _return_forward(rows, plan, axis, count):
  return _return(rows, plan, axis, count), (plan, jnp.zeros((len(rows), 0)))


def _return_backward(axis, count, saved, grad):
  plan, rows = saved
  return _exchange(grad, plan, axis, len(rows)), None


ragged_exchange.defvjp(_exchange_forward, _exchange_backward)
ragged_return.defvjp(_return_forward, _return_backward)


class _Runs(NamedTuple):
  """Runs [P, G] between this shard and each of P others, G each way."""

  start: jax.Array
  size: jax.Array
  landing: jax.Array


def _mine(table: jax.Array, shard: jax.Array) -> jax.Array:
  """Picks the columns [P, E / P] of this shard's experts from a table [P, E]."""
  width = table.shape[1] // table.shape[0]
  return jax.lax.dynamic_slice_in_dim(table, shard * width, width, axis=1)


def _move(rows: jax.Array, sent: _Runs, received: _Runs, axis: str, room: int) -> jax.Array:
  """Moves runs of rows [R, D] between shards, giving [room, D].

  Args:
    rows: what is sent.
    sent: runs that leave this shard; starts are here, landings there.
    received: runs that arrive; starts are there, landings here.
    axis: the mesh axis of the shards.
    room: rows of the result.
  """
  return jax.lax.platform_dependent(
    rows,
    sent,
    received,
    cpu=functools.partial(_move_padded, axis=axis, room=room),
    default=functools.partial(_move_ragged, axis=axis, room=room),
  )


def _move_ragged(rows, sent, received, axis, room):
  # A row as whole tiles of eight vectors: of plain rows a TPU's compiler makes tiles of two, which
  # by its own estimate take four times as long to fill and to read.
  width = rows.shape[1]
  tiled = (width // _LANES, _LANES) if width % (8 * _LANES) == 0 else (width,)
  moved = jax.lax.ragged_all_to_all(
    rows.reshape(-1, *tiled),
    jnp.zeros((room, *tiled), rows.dtype),
    sent.start.reshape(-1),
    sent.size.reshape(-1),
    sent.landing.reshape(-1),
    received.size.reshape(-1),
    axis_name=axis,
  )
  return moved.reshape(room, width)


def _move_padded(rows, sent, received, axis, room):
  # No shard gets more from another than that one has, nor more than it has room for.
  longest = min(len(rows), room)
  source = _unfold(sent.start, sent.size, longest, len(rows))
  padded = jnp.take(rows, source, axis=0, mode='fill', fill_value=0)
  arrived = jax.lax.all_to_all(padded, axis, 0, 0).reshape(-1, rows.shape[1])
  # Integers are scattered, and rows gathered: XLA's scatter of rows is slow.
  place = _unfold(received.landing, received.size, longest, room).reshape(-1)
  origin = jnp.full(room, len(arrived)).at[place].set(jnp.arange(len(arrived)), mode='drop')
  return jnp.take(arrived, origin, axis=0, mode='fill', fill_value=0)


def _unfold(start: jax.Array, size: jax.Array, longest: int, none: int) -> jax.Array:
  """Lists the rows of runs [P, G], one run after the other: [P, longest], `none` after the last."""
  ends = jnp.cumsum(size, axis=1)
  place = jnp.arange(longest)
  run = jnp.sum(place[:, None] >= ends[:, None, :], axis=2)
  within = jnp.minimum(run, size.shape[1] - 1)
  pick = functools.partial(jnp.take_along_axis, indices=within, axis=1)
  return jnp.where(run < size.shape[1], pick(start - ends + size) + place, none)
