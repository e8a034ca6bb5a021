"""Rotary embedding as a config: frequencies, factors, validation."""

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.rope import RoPE, YaRN
from deepseek_jax.ops.rope import rope_frequencies


def test_released_frequencies():
  np.testing.assert_array_equal(RoPE().frequencies(64), rope_frequencies(64, 10_000.0))
  slowed = RoPE(yarn=YaRN()).frequencies(64)
  np.testing.assert_allclose(slowed[[9, 16, 31]], [7.498942e-2, 5.5e-3, 3.333804e-6], rtol=5e-7)


def test_softmax_factor():
  assert RoPE().softmax_factor == 1.0
  assert RoPE(yarn=YaRN()).softmax_factor == pytest.approx(1.873854, abs=5e-7)
  assert RoPE(yarn=YaRN(mscale_all=0.707)).softmax_factor == pytest.approx(1.58963, abs=5e-6)


def test_rotated_channels_grow_by_the_ratio_of_the_two_magnitudes():
  x, positions = jnp.ones((1, 1, 4)), jnp.array([[5]])
  size = lambda rope: float(jnp.linalg.norm(rope.rotate(x, positions)))  # noqa: E731
  assert size(RoPE(yarn=YaRN(factor=40.0))) == pytest.approx(2.0, rel=1e-6)
  grown = size(RoPE(yarn=YaRN(factor=40.0, mscale=2.0, mscale_all=1.0)))
  # (0.2 ln 40 + 1) / (0.1 ln 40 + 1)
  assert grown == pytest.approx(2.0 * 1.737776 / 1.368888, rel=1e-6)


@pytest.mark.parametrize(
  'fields',
  [{'factor': 0.5}, {'original_length': 0}, {'beta_fast': 1.0}, {'beta_slow': 0.0}],
)
def test_wrong_yarn(fields):
  with pytest.raises(ConfigError, match=next(iter(fields))):
    YaRN(**fields)


def test_wrong_theta():
  with pytest.raises(ConfigError, match='theta'):
    RoPE(theta=1.0)
