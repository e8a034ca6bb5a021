"""What kernels cost, from calls as a TPU's compiler writes them."""

import pytest

from deepseek_jax.pods import hlo
from deepseek_jax.pods.kernels import KernelModel

# Cut from the step of configs/v3_671b.py for v5p:8x8x8, programs and layouts left out.
SPLASH = """HloModule m
ENTRY %main (m: s8[1,16,16], q: bf16[128,8192,192], v: bf16[128,8192,128]) -> bf16[128,8192,128] {
  %m = s8[1,16,16]{2,1,0} parameter(0)
  %q = bf16[128,8192,192]{2,1,0} parameter(1)
  %v = bf16[128,8192,128]{2,1,0} parameter(2)
  %splash_mha_KIND_segmented.7 = (bf16[128,8192,128]{2,1,0}, f32[128,8192,128]{2,1,0})
    custom-call(%m, %m, %q, %q, %v), custom_call_target="tpu_custom_call",
    frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(step)/a/splash_mha_KIND_segmented/pallas_call"}
  ROOT %o = bf16[128,8192,128]{2,1,0} get-tuple-element(%splash_mha_KIND_segmented.7), index=0
}
"""
GROUPED = """HloModule m
ENTRY %main (x: bf16[1024,256], w: bf16[8,256,128]) -> bf16[1024,128] {
  %x = bf16[1024,256]{1,0} parameter(0)
  %w = bf16[8,256,128]{2,1,0} parameter(1)
  ROOT %gmm.3 = bf16[1024,128]{1,0} custom-call(%x, %w), custom_call_target="tpu_custom_call",
    backend_config={"custom_call_config":{"cost_estimate":{"flops":"67108864","transcendentals":"0",
    "bytes_accessed":"1000"}}}
}
"""


def cost(text, **facts):
  """The work of the one call."""
  home = hlo.parse(text).main
  call = next(i for i in home.instructions if i.opcode == 'custom-call')
  return KernelModel(**facts)(home, call)


@pytest.mark.parametrize(('kind', 'widths'), [('fwd', 192 + 128), ('dq', 2 * 192 + 128)])
def test_attention_is_counted_from_its_blocks(kind, widths):
  """16 × 16 blocks of 512, those below the diagonal and on it."""
  pairs = 512 * 512 * 16 * 17 / 2
  found = cost(SPLASH.replace('KIND', kind))
  assert found.flops == found.kernel_flops == 2 * 128 * pairs * widths
  assert found.bytes > 128 * 8192 * 192 * 2


def test_a_window_has_fewer_blocks():
  """As many across as its mask lists."""
  whole, window = SPLASH.replace('KIND', 'dkv'), SPLASH.replace('KIND', 'dkv')
  window = window.replace('s8[1,16,16]', 's8[1,16,2]')
  assert cost(window).flops == pytest.approx(cost(whole).flops * 31 / (16 * 17 / 2))


def test_grouped_products_skip_rows_that_are_nobodys():
  """Half of a room for twice the even share."""
  assert cost(GROUPED).flops == 67108864
  assert cost(GROUPED, rows_filled=0.5).flops == 67108864 / 2
  assert cost(GROUPED, rows_filled=0.5).bytes == 500


def test_a_kernel_that_says_nothing_is_unknown():
  """And is not taken for free."""
  assert cost(GROUPED.replace('cost_estimate', 'other')) is None
  assert cost(SPLASH.replace('KIND', 'other')) is None
