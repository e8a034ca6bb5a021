"""Running sums of packed documents against loops."""

import jax
import numpy as np
import pytest

from deepseek_jax.ops.running import segment_sums


@pytest.mark.parametrize('length', [1, 7, 45])
def test_equals_the_oracle(length):
  rng = np.random.default_rng(length)
  x = rng.standard_normal((2, length, 3)).astype(np.float32)
  segments = np.sort(rng.integers(1, 5, (2, length)), axis=1).astype(np.int32)
  got = jax.jit(segment_sums)(x, segments)
  for b in range(2):
    for t in range(length):
      own = [x[b, s].astype(float) for s in range(t + 1) if segments[b, s] == segments[b, t]]
      np.testing.assert_allclose(got[b, t], sum(own), rtol=1e-5, atol=1e-5)


def test_documents_do_not_meet():
  """Not even in rounding, nor in numbers that are none."""
  x, segments = np.ones((1, 6, 1), np.float32), np.array([[1, 1, 1, 2, 2, 2]], np.int32)
  run = jax.jit(segment_sums)
  for foreign in (1e30, np.nan):
    x[0, :3] = foreign
    np.testing.assert_array_equal(run(x, segments)[0, 3:, 0], [1, 2, 3])
