"""Bytes by mesh axis, read from programs written by hand and from one that is compiled."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from deepseek_jax.sharding.traffic import read_collectives, sent_by_axes

SIZES = {'replica': 2, 'data': 4}
PROGRAM = """HloModule jit_run

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %g = f32[8,16]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[8,16]) tuple(%i, %g)
}

%condition (carry: (s32[], f32[8,16])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8,16]) -> f32[8,16] {
  %loop = (s32[], f32[8,16]) while(%init), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %r = (f32[10]{0}, bf16[6]{0}) all-reduce(%a, %b), replica_groups=[4,2]<=[2,4]T(1,0), \
to_apply=%add, metadata={op_name="jit(run)/sum"}
  %all = u8[2,50]{1,0} all-to-all(%c), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}
  %s = f32[4]{0} reduce-scatter(%d), replica_groups=mesh['replica'=2,'data'=4] {'data'}, \
to_apply=%add
  %w = (f32[16]{0}, f32[32]{0}) all-gather-start(%e), replica_groups={{0,4},{1,5},{2,6},{3,7}}
  %p = f32[5]{0} collective-permute(%f), source_target_pairs={{0,4},{4,0}}
  %o = f32[7]{0} all-reduce(%g), replica_groups={}, to_apply=%add
  ROOT %alone = f32[9]{0} all-reduce(%h), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}
}
"""


def test_by_hand():
  """Every way to write groups; a loop counts as often as it runs; groups of one send nothing."""
  found = read_collectives(PROGRAM, SIZES)
  assert [(c.kind, c.axes, c.size, c.payload, c.times) for c in found] == [
    ('all-gather', ('data',), 4, 512, 3),
    ('all-reduce', ('replica',), 2, 52, 1),
    ('all-to-all', ('replica',), 2, 100, 1),
    ('reduce-scatter', ('data',), 4, 16, 1),
    ('all-gather', ('replica',), 2, 128, 1),
    ('collective-permute', ('replica',), 2, 20, 1),
    ('all-reduce', ('replica', 'data'), 8, 28, 1),
  ]
  assert found[1].name == 'jit(run)/sum'
  assert found[1].dtypes == ('f32', 'bf16')
  assert sent_by_axes(found) == {
    ('data',): 512 * 3 / 4 * 3 + 16 * 3,
    ('replica',): 52 + 50 + 64 + 20,
    ('replica', 'data'): pytest.approx(2 * 7 / 8 * 28),
  }


def test_a_compiled_program():
  """A product over an axis is one sum along it, of the bytes of the result."""
  mesh = make_mesh(MeshConfig(replica=2, data=4), jax.devices())
  put = lambda *spec: NamedSharding(mesh, P(*spec))  # noqa: E731
  x = jax.ShapeDtypeStruct((8, 24), jnp.float32, sharding=put(None, 'data'))
  w = jax.ShapeDtypeStruct((24, 6), jnp.float32, sharding=put('data'))
  product = jax.jit(jnp.matmul, out_shardings=put()).lower(x, w).compile()
  (found,) = read_collectives(product.as_text(), dict(mesh.shape))
  assert (found.kind, found.axes, found.payload) == ('all-reduce', ('data',), 8 * 6 * 4)
