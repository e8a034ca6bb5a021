"""Rotary position embedding as a part of an attention kind."""

import dataclasses

import jax
import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.ops import rope as ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class YaRN:
  """Context extension by slowing the low frequencies.

  Attributes:
    factor: how many times longer the context becomes.
    original_length: tokens of context before extension.
    beta_fast: turns within `original_length` above which a channel is kept.
    beta_slow: turns below which a channel is slowed in full.
    mscale: growth of the rotated channels, per ln(factor) and tenth.
    mscale_all: growth of all logits, likewise; its square enters the softmax scale.

  Source: Peng et al., arXiv 2309.00071; DeepSeek-V2, arXiv 2405.04434, section 3.1.4.
  """

  factor: float = 40.0
  original_length: int = 4096
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0
  mscale_all: float = 1.0

  def __post_init__(self):
    if self.factor < 1.0:
      raise ConfigError(f'`factor` is {self.factor}; expected 1 or more')
    if self.original_length < 1:
      raise ConfigError(f'`original_length` is {self.original_length}; expected 1 or more')
    if not self.beta_fast > self.beta_slow > 0:
      raise ConfigError(
        f'`beta_fast` {self.beta_fast} must be above `beta_slow` {self.beta_slow}, both above 0'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoPE:
  """Interleaved rotary embedding.

  Attributes:
    theta: base of the frequencies.
    yarn: context extension, or None.
  """

  theta: float = 10_000.0
  yarn: YaRN | None = None

  def __post_init__(self):
    if not self.theta > 1.0:
      raise ConfigError(f'`theta` is {self.theta}; expected more than 1')

  def frequencies(self, dim: int) -> np.ndarray:
    """Returns [dim / 2] radians per position, float32."""
    plain = ops.rope_frequencies(dim, self.theta)
    if self.yarn is None:
      return plain
    return ops.yarn_frequencies(
      plain,
      theta=self.theta,
      factor=self.yarn.factor,
      original_length=self.yarn.original_length,
      beta_fast=self.yarn.beta_fast,
      beta_slow=self.yarn.beta_slow,
    )

  @property
  def softmax_factor(self) -> float:
    """Factor that context extension puts on the softmax scale."""
    if self.yarn is None:
      return 1.0
    return ops.yarn_magnitude(self.yarn.factor, self.yarn.mscale_all) ** 2

  def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Turns `x` [B, T, ..., R] to `positions` [B, T]."""
    return ops.rotate(x, positions, self.frequencies(x.shape[-1]), self._magnitude)

  def rotate_halves(self, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Turns `x` [B, T, ..., R], whose pairs are channels (k, k + R / 2), to `positions` [B, T]."""
    return ops.rotate_halves(x, positions, self.frequencies(x.shape[-1]), self._magnitude)

  @property
  def _magnitude(self) -> float:
    if self.yarn is None:
      return 1.0
    factor = self.yarn.factor
    return ops.yarn_magnitude(factor, self.yarn.mscale) / ops.yarn_magnitude(
      factor, self.yarn.mscale_all
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axial:
  """Rotary embedding of places with several coordinates: in a picture, in a clip, in space.

  Attributes:
    theta: base of the frequencies of every axis. A picture has few places along a side, and so less
      to tell apart than a text.

  Source: Heo et al., arXiv 2403.13298, section 3.2.
  """

  theta: float = 100.0

  def __post_init__(self):
    if not self.theta > 1.0:
      raise ConfigError(f'`theta` is {self.theta}; expected more than 1')

  def rotate(self, x: jax.Array, coordinates: jax.Array) -> jax.Array:
    """Turns `x` [B, T, ..., R] to `coordinates` [B, T, A]."""
    return ops.turn(x, ops.axial_angles(coordinates, x.shape[-1], self.theta))
