"""The table of accelerators."""

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.pods.chips import CHIPS, GIB, find_chip


def test_every_row_is_whole():
  """Rates, memory and wires of each generation, of one device of JAX."""
  assert set(CHIPS) == {'v5e', 'v5p', 'v6e', 'tpu7x'}
  for chip in CHIPS.values():
    assert chip.rate('bf16') > chip.vector_flops > 0
    assert 10 * GIB < chip.hbm_bytes < 200 * GIB
    # Every machine of the kind needs more FLOPs a byte than it has bytes a second.
    assert 100 < chip.rate('bf16') / chip.hbm_bandwidth < 700
    assert chip.hbm_bandwidth > chip.ici_link > chip.dcn_bandwidth
  assert CHIPS['tpu7x'].devices_per_chip == 2


def test_a_dtype_without_a_rate_has_that_of_bfloat16():
  """FP8 on a v5p is multiplied as bfloat16."""
  assert find_chip('v5p').rate('f8e4m3fn') == find_chip('v5p').rate('bf16')
  assert find_chip('tpu7x').rate('f8e4m3fn') == 2 * find_chip('tpu7x').rate('bf16')


def test_an_unknown_chip_is_refused_with_the_near_match():
  """And all that are known."""
  with pytest.raises(ConfigError, match='did you mean `v5p`'):
    find_chip('v5pp')
