"""Which axes an exchange goes along, what it sends, and how long that takes on a torus."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from deepseek_jax.pods import hlo
from deepseek_jax.pods.collective import (
  Collective,
  Wires,
  collective_seconds,
  first_group,
  lay_out,
  read_collective,
  varying_axes,
)
from deepseek_jax.pods.topology import parse_topology

SIZES = {'data': 2, 'seq': 2, 'model': 2}


def found(module, sizes):
  """Every collective of a module."""
  each = (
    read_collective(c, i, sizes) for c in module.computations.values() for i in c.instructions
  )
  return [item for item in each if item is not None]


CASES = {
  'all-gather': (lambda x, a: jax.lax.all_gather(x, a), 8.0, 7 / 8),
  'all-reduce': (lambda x, a: jax.lax.psum(x, a), 1.0, 2 * 7 / 8),
  'reduce-scatter': (lambda x, a: jax.lax.psum_scatter(x, a, tiled=True), 1.0, 7 / 8),
  'all-to-all': (lambda x, a: jax.lax.all_to_all(x, a, 0, 0, tiled=True), 1.0, 7 / 8),
}


@pytest.mark.parametrize('axes', [('data', 'seq', 'model'), ('seq',), ('data', 'model')])
@pytest.mark.parametrize('kind', CASES)
def test_the_axes_are_those_that_were_named(compiled, kind, axes):
  """Of the compiler's own output, for one axis, several, and axes that are no neighbours."""
  function, larger, _ = CASES[kind]
  count = 2 ** len(axes)
  mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), tuple(SIZES))
  with jax.set_mesh(mesh):
    run = jax.shard_map(
      functools.partial(function, a=axes), in_specs=PartitionSpec(), out_specs=PartitionSpec(axes),
      check_vma=False,
    )  # fmt: skip
    module, _ = compiled(run, jnp.ones((64, 8)))
  (item,) = found(module, SIZES)
  assert (item.kind, set(item.axes), len(item.group)) == (kind, set(axes), count)
  assert item.bytes == 64 * 8 * 4 * (count if larger > 1 else 1)
  assert item.sent == item.bytes * (count - 1) / count * (2 if kind == 'all-reduce' else 1)


@pytest.mark.parametrize(
  ('text', 'group'),
  [
    ('replica_groups={{0,3},{1,2}}', [0, 3]),
    ('replica_groups=[2,4]<=[8]', [0, 1, 2, 3]),
    ('replica_groups=[4,2]<=[2,4]T(1,0)', [0, 4]),
    ("replica_groups=mesh['axis_0'=4] {'axis_0'}", [0, 1, 2, 3]),
    ("replica_groups=mesh['data'=2,'seq'=2,'model'=2] {'data'}", [0, 4]),
    ("replica_groups=mesh['data'=2,'seq'=2,'model'=2] {'data', 'model'}", [0, 1, 4, 5]),
    ("replica_groups=mesh['x'=8] {'x':(2)2}", [0, 2]),
    ("replica_groups=mesh['x'=8] {'x':(1)4}", [0, 2, 4, 6]),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [0, 4]),
    ('replica_groups={}', list(range(8))),
    ('source_target_pairs={{0,2},{2,4},{4,0}}', [0, 2, 4]),
    ('source_target_pairs={{0,1},{1,0},{2,3},{3,2}}', [0, 1]),
  ],
)
def test_every_way_of_writing_groups(text, group):
  """Lists, strides, named axes and parts of them, pairs."""
  line = f'  ROOT %c = f32[8]{{0}} all-reduce(%x), channel_id=1, {text}, to_apply=%add\n'
  module = hlo.parse(
    'ENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n' + line + '}'
  )
  assert first_group(module.main.root, 8) == group


def test_axes_along_which_a_group_differs():
  """Places in the mesh, last axis fastest."""
  assert varying_axes([0, 2], SIZES) == ('seq',)
  assert varying_axes([1, 5, 3, 7], SIZES) == ('data', 'seq')
  assert varying_axes([3], SIZES) == ()


def test_wires_of_a_group():
  """Rings, open lines, every other chip of a ring, and both at once."""
  topology = parse_topology('v5p:8x8x8')
  coords = [(x, y, z, 0, 0) for x in range(8) for y in range(8) for z in range(8)]
  assert lay_out(range(8), coords, topology) == Wires((8,), (2,), (1,))
  assert lay_out(range(0, 8, 2), coords, topology) == Wires((4,), (2,), (2,))
  assert lay_out(range(4), coords, topology) == Wires((4,), (1,), (1,))
  assert lay_out(range(64), coords, topology) == Wires((8, 8), (2, 2), (1, 1))
  short = parse_topology('v6e:4x4')
  grid = [(x, y, 0, 0) for x in range(4) for y in range(4)]
  assert lay_out(range(4), grid, short).ways == (1,)


def test_seconds_on_a_torus():
  """By hand: links of 100 GB/s; two directions of a ring; half of everybody's way on a line."""
  topology, size = parse_topology('v5p:8x8x8'), 8e9
  ring, line = Wires((8,), (2,), (1,)), Wires((8,), (1,), (1,))

  def seconds(kind, wires):
    return collective_seconds(Collective(kind, ('data',), tuple(range(8)), size), wires, topology)

  assert seconds('all-gather', ring) == pytest.approx(7e9 / 200e9)
  assert seconds('all-gather', line) == pytest.approx(7e9 / 100e9)
  assert seconds('all-reduce', ring) == pytest.approx(14e9 / 200e9)
  assert seconds('all-to-all', ring) == pytest.approx(7e9 * 8 / 8 / 100e9)
  assert seconds('all-to-all', line) == pytest.approx(7e9 * 8 / 4 / 100e9)
  assert seconds('all-gather', Wires((8, 8), (2, 2), (1, 1))) == pytest.approx(7e9 / 400e9)
  assert seconds('all-gather', Wires((4,), (2,), (2,))) == pytest.approx(7e9 / 100e9)
  across = Wires((8,), (2,), (1,), slices=2)
  assert seconds('all-gather', across) == pytest.approx(7e9 / 6.25e9)
  alone = Collective('all-gather', (), (0,), size)
  assert collective_seconds(alone, ring, topology) == 0
