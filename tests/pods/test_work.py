"""FLOPs and bytes of instructions against the compiler's own count, where it has one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.pods import hlo
from deepseek_jax.pods.work import Work, convolution_flops, instruction_work


def total(module):
  """The work of a module without loops."""
  found = Work()
  for instruction in module.main.instructions:
    found = found.plus(instruction_work(module, module.main, instruction, lambda *_: None))
  return found


CASES = {
  'matrix product': (lambda a, b: a @ b, (33, 65), (65, 129)),
  'batch': (lambda a, b: jnp.einsum('bij,bjk->bik', a, b), (3, 17, 40), (3, 40, 24)),
  'two contracted': (lambda a, b: jnp.einsum('aij,ijk->ak', a, b), (9, 7, 11), (7, 11, 13)),
  'convolution': (
    lambda a, b: jax.lax.conv_general_dilated(a, b, (2, 1), ((1, 2), (0, 1))),
    (2, 5, 16, 9),
    (7, 5, 3, 4),
  ),
  'dilated': (
    lambda a, b: jax.lax.conv_general_dilated(
      a, b, (1, 1), ((2, 1), (1, 1)), lhs_dilation=(2, 1), rhs_dilation=(1, 2)
    ),
    (2, 4, 8, 9),
    (6, 4, 3, 3),
  ),
  'groups': (
    lambda a, b: jax.lax.conv_general_dilated(a, b, (1,), ((1, 1),), feature_group_count=4),
    (2, 8, 30),
    (12, 2, 3),
  ),
}


@pytest.mark.parametrize('name', CASES)
def test_flops_are_the_compilers(compiled, name):
  """Of products and convolutions, padding left out; XLA counts a few elements more."""
  function, *shapes = CASES[name]
  module, found = compiled(function, *(jnp.ones(shape) for shape in shapes))
  assert total(module).flops == pytest.approx(found.cost_analysis()['flops'], rel=0.02)


def test_a_batch_of_products_as_a_convolution():
  """As a TPU's compiler writes it: a window over rows that are spread out."""
  text = """HloModule m
ENTRY %main (a: bf16[4,64,32], b: bf16[4,32,16]) -> bf16[4,64,16] {
  %a = bf16[4,64,32]{2,1,0} parameter(0)
  %b = bf16[4,32,16]{2,1,0} parameter(1)
  ROOT %c = bf16[4,64,16]{2,1,0} convolution(%a, %b),
    window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}
"""
  module = hlo.parse(text)
  assert convolution_flops(module.main, module.main.root) == 2 * 4 * 64 * 32 * 16


def test_bytes_of_a_fusion(compiled):
  """What is read and written once, whatever happens between."""
  module, _ = compiled(lambda x, y: jnp.tanh(x) * y + 1, jnp.ones((64, 32)), jnp.ones((64, 32)))
  assert total(module).bytes == 3 * 64 * 32 * 4


def test_a_slice_of_a_large_array_is_all_that_is_read(compiled):
  """And an update in place all that is written."""
  x = jax.ShapeDtypeStruct((1000, 128), jnp.float32)

  def read(x, i):
    return jax.lax.dynamic_slice_in_dim(x, i, 2) * 2

  module, _ = compiled(read, x, jnp.int32(3))
  assert total(module).bytes < 10 * 128 * 4

  def write(x, i):
    return jax.lax.dynamic_update_slice_in_dim(x, jnp.ones((2, 128)), i, 0)

  module, _ = compiled(write, x, jnp.int32(3), donate_argnums=0)
  assert total(module).bytes < 10 * 128 * 4


def test_slices_are_found_in_fusions_of_fusions():
  """Behind a bitcast, and in a fusion in the fusion."""
  text = """HloModule m
%inner (a: f32[100,64], i: s32[]) -> f32[1,64] {
  %a = f32[100,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[100,64]{1,0} bitcast(%a)
  ROOT %s = f32[1,64]{1,0} dynamic-slice(%b, %i, %i), dynamic_slice_sizes={1,64}
}
%outer (c: f32[100,64], j: s32[]) -> f32[1,64] {
  %c = f32[100,64]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %f = f32[1,64]{1,0} fusion(%c, %j), kind=kLoop, calls=%inner
  ROOT %n = f32[1,64]{1,0} negate(%f)
}
ENTRY %main (x: f32[100,64], k: s32[]) -> f32[1,64] {
  %x = f32[100,64]{1,0} parameter(0)
  %k = s32[] parameter(1)
  ROOT %y = f32[1,64]{1,0} fusion(%x, %k), kind=kLoop, calls=%outer
}
"""
  assert total(hlo.parse(text)).bytes == 2 * 64 * 4 + 4
  whole = text.replace('negate(%f)', 'add(%f, %c)')
  assert total(hlo.parse(whole)).bytes == 64 * 4 + 100 * 64 * 4 + 4


def test_what_lies_beside_the_core_moves_nothing():
  """Memory space 1."""
  text = """HloModule m
ENTRY %main (a: f32[64,32]) -> f32[64,32] {
  %a = f32[64,32]{1,0} parameter(0)
  %b = f32[64,32]{1,0S(1)} tanh(%a)
  ROOT %c = f32[64,32]{1,0} negate(%b)
}
"""
  assert total(hlo.parse(text)).bytes == 2 * 64 * 32 * 4
  assert total(hlo.parse(text.replace('S(1)', ''))).bytes == 4 * 64 * 32 * 4


def test_work_adds_up():
  """By dtype."""
  found = Work({'bf16': 2.0}, 1.0, 3.0, 1.0).plus(Work({'bf16': 1.0, 's8': 4.0}, 1.0, 1.0, 1.0), 2)
  assert found == Work({'bf16': 4.0, 's8': 8.0}, 3.0, 5.0, 3.0)
  assert found.flops == 12
  assert np.isclose(Work().flops, 0)
