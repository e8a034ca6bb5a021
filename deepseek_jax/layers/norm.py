"""Root-mean-square normalisation."""

import dataclasses

import flax.linen as nn
import jax

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers import weights
from deepseek_jax.ops.norm import rms_norm


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
