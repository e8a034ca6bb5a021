"""What lies in memory when most does, and whose it is."""

import pytest

from deepseek_jax.pods import hlo
from deepseek_jax.pods.memory import argument_class, held_at_peak, live_at_peak, sum_by_class

# As the compiler writes it.
RANGES = """HloLiveRange (max 40):
  InstructionSequence:
    0:p
  BufferLiveRange:
    p{}:0-4
  Live ranges at 31 (peak):
    loop{1}: 4096 bytes (cumulative: 4096 bytes)
    p{}: 512 bytes (cumulative: 4608 bytes)
    g{}: 256 bytes (cumulative: 4864 bytes)
    c{}: 128 bytes (cumulative: 4992 bytes)
    elsewhere{}: 64 bytes (cumulative: 5056 bytes)
  Stack trace breakdown for peak usage: 5 056 bytes
    main.1 (100.0%, total: 5 056 bytes)
"""
TEXT = """HloModule m
%body (arg: (s32[], bf16[4,8,64])) -> (s32[], bf16[4,8,64]) {
  %arg = (s32[], bf16[4,8,64]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %old = bf16[4,8,64]{2,1,0} get-tuple-element(%arg), index=1
  %new = bf16[4,8,64]{2,1,0} dynamic-update-slice(%old, %old, %i),
    metadata={op_name="jit(step)/jvp(Decoder.every_depth)/Decoder.run/stack/while/body/update"}
  ROOT %out = (s32[], bf16[4,8,64]{2,1,0}) tuple(%i, %new)
}
%cond (arg.1: (s32[], bf16[4,8,64])) -> pred[] {
  %arg.1 = (s32[], bf16[4,8,64]{2,1,0}) parameter(0)
  %j = s32[] get-tuple-element(%arg.1), index=0
  ROOT %less = pred[] compare(%j, %j), direction=LT
}
ENTRY %main.1 (p: f32[16,8]) -> f32[16,8] {
  %p = f32[16,8]{1,0} parameter(0), metadata={op_name="state.params[\\'head\\'][\\'weight\\']"}
  %zero = s32[] constant(0)
  %empty = bf16[4,8,64]{2,1,0} broadcast(%zero)
  %pair = (s32[], bf16[4,8,64]{2,1,0}) tuple(%zero, %empty)
  %loop = (s32[], bf16[4,8,64]{2,1,0}) while(%pair), condition=%cond, body=%body
  %g = f32[16,8]{1,0} negate(%p), metadata={op_name="jit(step)/transpose(jvp(head))/mul"}
  %t = f32[32]{0} tanh(%p), metadata={op_name="jit(step)/transpose(jvp(x))/block/tanh"}
  %c = f32[32]{0} copy(%t)
  ROOT %r = f32[16,8]{1,0} add(%p, %g)
}
"""


def test_the_peak_is_read():
  """Names with places in tuples, bytes; nothing before or after."""
  assert live_at_peak(RANGES) == {'loop{1}': 4096, 'p': 512, 'g': 256, 'c': 128, 'elsewhere': 64}
  assert live_at_peak('') == {}


def test_everything_has_a_class_and_a_maker():
  """Also what a loop carries, and copies, which have no name of their own."""
  held = held_at_peak(hlo.parse(TEXT), live_at_peak(RANGES), {(16, 8): 'head/weight'})
  found = {h.bytes: (h.kind, h.module, h.phase, h.shape) for h in held}
  assert found[4096] == ('activations', 'scans', 'forward', 'bf16[4,8,64]')
  assert found[512][:3] == ('parameters', "state.params[\\'head\\'][\\'weight\\']", '')
  assert found[256] == ('gradients', 'head/weight', 'backward', 'f32[16,8]')
  assert found[128] == ('temporaries', 'x/block', 'backward', 'f32[32]')
  assert found[64] == ('temporaries', 'step', 'forward', '')
  sums = sum_by_class(held)
  assert sums['activations'] == 4096
  assert sum(sums.values()) == 5056


@pytest.mark.parametrize(
  ('label', 'kind'),
  [
    ("state.params[\\'a\\']", 'parameters'),
    ("state.opt_state[1].mu[\\'a\\']", 'optimizer'),
    ("state.buffers[\\'a\\']", 'buffers'),
    ('state.guard.mean', 'other state'),
    ('state.step', 'other state'),
    ('batch.tokens', 'batch'),
    ("variables[\\'params\\'][\\'a\\']", 'parameters'),
    ('caches[0][0].attention.keys', 'cache'),
    ('positions', 'batch'),
  ],
)
def test_arguments(label, kind):
  """Of training and of decoding, by their names in HLO."""
  assert argument_class(label) == kind
