"""Reading HLO: by hand, and of what the compiler makes here."""

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.pods import hlo

TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[2]{0})->f32[2]{0}}

%inner (p.0: f32[2]) -> f32[2] {
  %p.0 = f32[2]{0:T(128)} parameter(0)
  ROOT %double.1 = f32[2]{0:T(128)} add(%p.0, %p.0), metadata={op_name="jit(step)/a/\\'b\\'/add"}
}

%body (arg: (s32[], f32[2])) -> (s32[], f32[2]) {
  %arg = (s32[]{:T(128)}, f32[2]{0:T(128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = f32[2]{0:T(128)S(1)} get-tuple-element(%arg), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %y = f32[2]{0:T(128)} fusion(%x), kind=kLoop, calls=%inner, note={kernel_metadata={
"blocks":"{\\"q\\": 512}"
}}, backend_config={"a":{"estimated_cycles":"33"}}
  ROOT %out = (s32[]{:T(128)}, f32[2]{0:T(128)}) tuple(%next, %y)
}

%condition (arg.1: (s32[], f32[2])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %arg.1 = (s32[]{:T(128)}, /*index=1*/f32[2]{0:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main.1 (p: f32[2]) -> f32[2] {
  %p = f32[2]{0:T(128)} parameter(0), metadata={op_name="state.params[\\'w\\']"}
  %start = s32[]{:T(128)} constant(2)
  %begin = s32[]{:T(128)} copy(%start)
  %pair = (s32[]{:T(128)}, f32[2]{0:T(128)}) tuple(%begin, %p)
  %loop = (s32[]{:T(128)}, f32[2]{0:T(128)}) while(%pair), condition=%condition, body=%body
  ROOT %result = f32[2]{0:T(128)} get-tuple-element(%loop), index=1
}
"""


def test_a_module_is_read():
  """Computations, instructions with layouts, operands, attributes, names."""
  module = hlo.parse(TEXT)
  assert set(module.computations) == {'inner', 'body', 'condition', 'main.1'}
  assert module.main.name == 'main.1'
  fusion = module.computations['body'].by_name['y']
  assert (fusion.opcode, fusion.operands, fusion.cycles) == ('fusion', ('x',), 33)
  assert fusion.called == {'calls': 'inner'}
  assert fusion.attribute('kind') == 'kLoop'
  assert fusion.backend() == {'a': {'estimated_cycles': '33'}}
  assert [c.name for c in module.inner(fusion)] == ['inner']
  body = module.computations['body']
  assert body.reads(fusion) == [hlo.Array('f32', (2,), space=1)]
  assert body.root.name == 'out'
  assert module.computations['inner'].root.op_name.endswith('/add')
  assert [a.bytes for a in body.root.arrays] == [4, 8]


def test_trips_are_counted_from_where_the_counter_begins():
  """The counter begins at 2, through a copy, and ends before 7."""
  module = hlo.parse(TEXT)
  loop = module.main.by_name['loop']
  assert hlo.trip_count(module, module.main, loop) == 5
  for old, new, trips in (
    ('constant(2)', 'constant(0)', 7),
    ('direction=LT', 'direction=NE', None),
    ('s32[]{:T(128)} constant(7)', 's32[]{:T(128)} negate(%j)', None),
    ('body=%body', 'body=%body, backend_config={"known_trip_count":{"n":"11"}}', 11),
  ):
    changed = hlo.parse(TEXT.replace(old, new))
    loop = changed.main.by_name['loop']
    assert hlo.trip_count(changed, changed.main, loop) == trips, new


def test_estimates_that_stand_for_nothing_are_none():
  """Kernels have 2⁶³ - 1 cycles."""
  module = hlo.parse(TEXT.replace('"33"', '"9223372036854775807"'))
  assert module.computations['body'].by_name['y'].cycles is None


@pytest.mark.parametrize(
  ('text', 'arrays'),
  [
    ('f32[2,3]{1,0:T(8,128)(2,1)S(1)}', [('f32', (2, 3), 1, 24)]),
    ('(bf16[4]{0}, s32[])', [('bf16', (4,), 0, 8), ('s32', (), 0, 4)]),
    ('s4[3]{0:E(4)}', [('s4', (3,), 0, 2)]),
    ('token[]', [('token', (), 0, 0)]),
    ('pred[0,8]{1,0}', [('pred', (0, 8), 0, 0)]),
    ('f8e4m3fn[16]{0}', [('f8e4m3fn', (16,), 0, 16)]),
  ],
)
def test_types(text, arrays):
  """Of one array and of tuples, with bits smaller than a byte."""
  assert [(a.dtype, a.shape, a.space, a.bytes) for a in hlo.parse_type(text)] == arrays


def test_what_is_no_module_is_refused():
  """By name."""
  with pytest.raises(ValueError, match='no ENTRY computation'):
    hlo.parse('%f (x: f32[]) -> f32[] {\n  ROOT %x = f32[] parameter(0)\n}\n')


def test_every_instruction_the_compiler_writes_is_read(compiled):
  """Opcodes, loops and their trips of a scan in a scan."""

  def inner(x, _):
    return jnp.tanh(x @ x), None

  def outer(x, _):
    return jax.lax.scan(inner, x, None, length=3)[0], None

  module, found = compiled(lambda x: jax.lax.scan(outer, x, None, length=5)[0], jnp.ones((8, 8)))
  lines = [line for line in found.as_text().splitlines() if ' = ' in line and line[:2] == '  ']
  assert sum(len(c.instructions) for c in module.computations.values()) == len(lines)
  trips = [
    hlo.trip_count(module, home, i)
    for home in module.computations.values()
    for i in home.instructions
    if i.opcode == 'while'
  ]
  assert sorted(trips) == [3, 5]
