"""Going through a schedule: loops, branches, what runs beside what."""

import pytest

from deepseek_jax.pods import hlo
from deepseek_jax.pods.estimate import Machine, estimate, work_seconds
from deepseek_jax.pods.topology import parse_topology
from deepseek_jax.pods.work import Work

TOPOLOGY = parse_topology('v5p:2x2x1')
MACHINE = Machine(
  topology=TOPOLOGY,
  sizes={'data': 4},
  coords=[(0, 0, 0, 0, 0), (0, 1, 0, 0, 0), (1, 0, 0, 0, 0), (1, 1, 0, 0, 0)],
)
SIDE = 8192
PRODUCT = 2 * SIDE**3 / 459e12
GATHER = 3 / 4 * SIDE * SIDE * 2 / 200e9
"""Over two open lines, both used."""

TEXT = """HloModule m, is_scheduled=true

ENTRY %main (x: bf16[8192,8192], w: bf16[2048,8192]) -> bf16[8192,8192] {
  %x = bf16[8192,8192]{1,0} parameter(0)
  %w = bf16[2048,8192]{1,0} parameter(1)
  %s = (bf16[2048,8192]{1,0}, bf16[8192,8192]{1,0}) all-gather-start(%w),
    replica_groups={{0,1,2,3}}, dimensions={0}, metadata={op_name="jit(f)/layer/gather/all_gather"}
  %y = bf16[8192,8192]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0},
    metadata={op_name="jit(f)/layer/a/dot_general"}
  %d = bf16[8192,8192]{1,0} all-gather-done(%s)
  ROOT %z = bf16[8192,8192]{1,0} dot(%y, %d), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def run(text):
  """The tally of a text."""
  return estimate(hlo.parse(text), MACHINE, lambda *_: None)


def test_what_is_begun_early_hides_behind_what_stands_between():
  """The gather takes less than a product, so nothing of it is seen."""
  assert GATHER < PRODUCT
  tally = run(TEXT)
  assert tally.total_seconds == pytest.approx(2 * PRODUCT)
  assert tally.exchange_seconds == {'data': pytest.approx(GATHER)}
  assert sum(tally.exposed_seconds.values()) == 0
  assert tally.exchanged == {('data', 'layer/gather', 'all-gather'): 0.75 * SIDE * SIDE * 2}


def test_what_is_waited_for_at_once_is_seen_whole():
  """A gather that is begun and ended in one."""
  lines = TEXT.replace('all-gather-start', 'all-gather').replace('%w),', '%w),', 1)
  lines = lines.replace(
    '(bf16[2048,8192]{1,0}, bf16[8192,8192]{1,0}) all-gather', 'bf16[8192,8192]{1,0} all-gather'
  ).replace('all-gather-done', 'bitcast')
  tally = run(lines)
  assert tally.total_seconds == pytest.approx(2 * PRODUCT + GATHER)
  assert tally.exposed_seconds == {'data': pytest.approx(GATHER)}


def test_exchanges_wait_for_each_other():
  """Ten at once take ten times as long, behind one product."""
  line = TEXT[TEXT.index('  %s ') : TEXT.index('  %y ')]
  done = '  %d = bf16[8192,8192]{1,0} all-gather-done(%s)\n'
  more = ''.join(line.replace('%s =', f'%s{i} =') for i in range(9))
  ends = ''.join(done.replace('%d', f'%d{i}').replace('%s', f'%s{i}') for i in range(9))
  tally = run(TEXT.replace(line, line + more).replace(done, done + ends))
  assert tally.total_seconds == pytest.approx(max(10 * GATHER, PRODUCT) + PRODUCT)


@pytest.mark.parametrize(
  ('form', 'named'), [('custom-call', 'called_computations={%aside}'), ('call', 'to_apply=%aside')]
)
def test_a_collective_on_a_core_of_its_own(form, named):
  """The same program where the gather is a computation that another core is given."""
  start = TEXT.index('  %s ')
  call = """  %c = ((), (s32[9999999]{0})) custom-call-start(), async_execution_thread="sparsecore",
    called_computations={%aside}
  %s = ((bf16[2048,8192]{1,0}), bf16[8192,8192]{1,0}, (s32[9999999]{0})) custom-call-update(%c, %w)
"""
  aside = """%aside (p: bf16[2048,8192]) -> bf16[8192,8192] {
  %p = bf16[2048,8192]{1,0} parameter(0)
  %t = (bf16[2048,8192]{1,0}) tuple(%p)
  %e = bf16[2048,8192]{1,0} get-tuple-element(%t), index=0
  ROOT %g = bf16[8192,8192]{1,0} all-gather(%e), replica_groups={{0,1,2,3}}, dimensions={0},
    metadata={op_name="jit(f)/layer/gather/all_gather"}
}, execution_thread="sparsecore"

"""
  text = TEXT[:start] + call + TEXT[TEXT.index('  %y ') :]
  text = text.replace('custom-call', form).replace('called_computations={%aside}', named)
  text = text.replace('ENTRY', f'{aside}ENTRY').replace('all-gather-done', f'{form}-done')
  tally, expected = run(text), run(TEXT)
  assert tally.exchanged == expected.exchanged
  assert tally.exchange_seconds == expected.exchange_seconds
  # Its room for numbers is no work, and it hides behind the product as the other does.
  assert tally.total_seconds == expected.total_seconds
  assert tally.all_work == expected.all_work


def test_waiting_for_a_copy_counts():
  """One that is begun and ended with nothing between."""
  text = """HloModule m
ENTRY %main (x: f32[1024,1024]) -> f32[1024,1024] {
  %x = f32[1024,1024]{1,0} parameter(0)
  %c = (f32[1024,1024]{1,0S(1)}, f32[1024,1024]{1,0}, u32[]) copy-start(%x)
  ROOT %d = f32[1024,1024]{1,0S(1)} copy-done(%c)
}
"""
  tally = run(text)
  assert tally.copy_seconds == tally.total_seconds == pytest.approx(4 * 2**20 / 2765e9)


def test_the_longest_branch_counts():
  """Of a condition."""
  text = """HloModule m
%long (a: f32[64,64]) -> f32[64,64] {
  %a = f32[64,64]{1,0} parameter(0)
  ROOT %b = f32[64,64]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%short (c: f32[64,64]) -> f32[64,64] {
  ROOT %c = f32[64,64]{1,0} parameter(0)
}
ENTRY %main (p: s32[], x: f32[64,64]) -> f32[64,64] {
  %p = s32[] parameter(0)
  %x = f32[64,64]{1,0} parameter(1)
  ROOT %r = f32[64,64]{1,0} conditional(%p, %x, %x), branch_computations={%short, %long}
}
"""
  assert run(text).all_work.flops == 2 * 64**3


def test_something_takes_its_longest_part():
  """Products, other operations, bytes."""
  chip = TOPOLOGY.chip
  assert work_seconds(Work({'bf16': 459e12}), chip) == pytest.approx(1)
  assert work_seconds(Work({'s8': 459e12}), chip) == pytest.approx(0.5)
  assert work_seconds(Work({'bf16': 1.0}, 0.0, 2765e9), chip) == pytest.approx(1)
  assert work_seconds(Work({}, 14.3e12, 1.0), chip) == pytest.approx(1)
