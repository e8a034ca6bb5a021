"""Rows that travel between shards, against loops that carry them one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from deepseek_jax.ops import exchange
from deepseek_jax.ops.exchange import plan_exchange, ragged_exchange, ragged_return, received_sizes

P, E, R, D = 4, 8, 13, 3
TOTAL = P * R
CASES = {
  'uneven': np.random.default_rng(0).multinomial(R, np.arange(1, E + 1) / 36, P),
  'one_expert': np.eye(E, dtype=int)[[5] * P] * R,
  'nothing': np.zeros((P, E), int),
  'one_row': np.eye(E, dtype=int)[[2, 0, 7, 7]] * [[0], [1], [0], [0]],
  'some_nobody': np.tile([1, 0, 2, 0, 0, 3, 0, 1], (P, 1)),
}


def carry(rows, counts, room):
  """Where every row arrives, expert by expert and sender by sender.

  Returns:
    What arrives [P, room, D], rows a shard's expert received [P, E / P], and which of the senders'
    rows travelled [P, R].
  """
  arrived, sizes = np.zeros((P, room, D), rows.dtype), np.zeros((P, E // P), int)
  travelled = np.zeros((P, R), bool)
  filled = [0] * P
  for expert in range(E):
    to = expert // (E // P)
    for sender in range(P):
      first = counts[sender, :expert].sum()
      for row in range(first, first + counts[sender, expert]):
        if filled[to] < room:
          arrived[to, filled[to]] = rows[sender, row]
          filled[to] += 1
          sizes[to, expert % (E // P)] += 1
          travelled[sender, row] = True
  return arrived, sizes, travelled


@functools.cache
def program(room):
  """There and back, with gradients, on four devices."""

  def shard(rows, counts, back):
    plan = plan_exchange(counts[0], 'expert', room)
    there = lambda rows: ragged_exchange(rows, plan, 'expert', room)  # noqa: E731
    arrived, pull = jax.vjp(there, rows[0])
    returned, pull_back = jax.vjp(lambda x: ragged_return(x, plan, 'expert', R), arrived)
    found = arrived, received_sizes(plan), returned, pull(back[0])[0], pull_back(rows[0])[0]
    return jax.tree.map(lambda x: x[None], found)

  mesh = Mesh(np.array(jax.devices()[:P]), ('expert',), axis_types=(AxisType.Auto,))
  spec = jax.P('expert')
  mapped = jax.shard_map(
    shard, in_specs=(spec,) * 3, out_specs=spec, axis_names={'expert'}, check_vma=False
  )

  def run(*arguments):
    with jax.set_mesh(mesh):
      return jax.device_get(jax.jit(mapped)(*arguments))

  return run


def check(run, counts, room):
  draw = np.random.default_rng(1)
  rows, back = (draw.standard_normal((P, n, D)).astype(np.float32) for n in (R, room))
  found = run(rows, counts.astype(np.int32), back)
  arrived, sizes, travelled = carry(rows, counts, room)
  np.testing.assert_array_equal(found[0], arrived)
  np.testing.assert_array_equal(found[1], sizes)
  np.testing.assert_array_equal(found[2], np.where(travelled[..., None], rows, 0))
  # The gradient of a row that arrives is that of the row that left, and the other way round.
  tags = np.arange(1, P * R + 1).reshape(P, R, 1).repeat(D, axis=2)
  origin = carry(tags, counts, room)[0][..., 0]
  grads = np.zeros((P * R + 1, D), np.float32)
  grads[origin.ravel()] = back.reshape(-1, D)
  np.testing.assert_array_equal(found[3], grads[1:].reshape(P, R, D) * travelled[..., None])
  np.testing.assert_array_equal(found[4], arrived)


@pytest.mark.parametrize('room', [TOTAL, 7])
@pytest.mark.parametrize('case', CASES)
def test_there_and_back(case, room):
  """Bit for bit, with room for everything and with room for some."""
  counts = CASES[case]
  check(program(room), counts, room)
  travelled = carry(np.zeros((P, R, D)), counts, room)[2].sum()
  assert (travelled == counts.sum()) == (room == TOTAL or case in ('nothing', 'one_row'))


def stand_in(rows, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
  """`jax.lax.ragged_all_to_all` as its documentation has it, by showing everything to everybody."""
  gather = functools.partial(jax.lax.all_gather, axis_name=axis_name)
  every, starts, sizes, landings = map(gather, (rows, input_offsets, send_sizes, output_offsets))
  shard, slices = jax.lax.axis_index(axis_name), len(send_sizes) // len(every)
  for sender in range(len(every)):
    for i in range(slices):
      pick = lambda table, at=(sender, shard * slices + i): table[at]  # noqa: E731
      # What the receiver expects must be what the sender sends, or the operation hangs.
      agreed = pick(sizes) == recv_sizes[sender * slices + i]
      place = jnp.arange(len(rows)) - pick(starts)
      own = (place >= 0) & (place < pick(sizes)) & agreed
      place = jnp.where(own, place + pick(landings), len(output))
      output = output.at[place].set(every[sender], mode='drop')
  return output


@pytest.mark.parametrize('room', [TOTAL, 7])
def test_the_form_of_accelerators(room, monkeypatch):
  """Its one operation does not run here: the offsets and sizes it is given do."""
  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', stand_in)
  monkeypatch.setattr(exchange, '_move_padded', exchange._move_ragged)
  run = program.__wrapped__(room)
  for case in ('uneven', 'one_row', 'some_nobody'):
    check(run, CASES[case], room)


def test_each_platform_has_its_form():
  """The ragged operation on accelerators alone."""
  mesh = Mesh(np.array(jax.devices()[:P]), ('expert',), axis_types=(AxisType.Auto,))

  def shard(rows, counts):
    plan = plan_exchange(counts, 'expert', TOTAL)
    return ragged_exchange(rows, plan, 'expert', TOTAL)

  spec = jax.P('expert')
  mapped = jax.shard_map(
    shard, in_specs=(spec, spec), out_specs=spec, axis_names={'expert'}, check_vma=False
  )
  with jax.set_mesh(mesh):
    traced = jax.jit(mapped).trace(jnp.zeros((P * R, D)), jnp.zeros(P * E, jnp.int32))
    for platform in ('cpu', 'tpu', 'cuda', 'rocm'):
      text = traced.lower(lowering_platforms=(platform,)).as_text()
      assert ('ragged_all_to_all' in text) == (platform != 'cpu')
