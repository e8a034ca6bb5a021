"""Normalisation of vectors: by their root mean square, or by mean and deviation."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers import weights
from deepseek_jax.ops.norm import layer_norm, rms_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSNorm:
  """Divides a vector by its root mean square and scales it.

  Attributes:
    epsilon: added to the mean square.
  """

  epsilon: float = 1e-6

  def __post_init__(self):
    if not self.epsilon > 0:
      raise ConfigError(f'`epsilon` is {self.epsilon}; expected a number above 0')

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return RMSNormLayer(self, name=name)


class RMSNormLayer(nn.Module):
  """[..., D] -> [..., D]; the statistics are float32."""

  config: RMSNorm

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last axis of `x` [..., D]."""
    return rms_norm(x, weights.scale(self, 'scale', x.shape[-1]), self.config.epsilon)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNorm:
  """Takes the mean from a vector, divides it by its deviation, scales it and adds an offset.

  Attributes:
    epsilon: added to the variance.

  Source: Ba et al., arXiv 1607.06450.
  """

  epsilon: float = 1e-6

  def __post_init__(self):
    if not self.epsilon > 0:
      raise ConfigError(f'`epsilon` is {self.epsilon}; expected a number above 0')

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return LayerNormLayer(self, name=name)


class LayerNormLayer(nn.Module):
  """[..., D] -> [..., D]; the statistics are float32."""

  config: LayerNorm

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last axis of `x` [..., D]."""
    size = x.shape[-1]
    offset = weights.vector(self, 'offset', np.zeros(size, np.float32))
    return layer_norm(x, weights.scale(self, 'scale', size), offset, self.config.epsilon)
