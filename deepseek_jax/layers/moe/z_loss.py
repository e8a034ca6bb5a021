"""A loss that keeps the logits of a router small."""

import dataclasses

import jax

from deepseek_jax.core.config import ConfigError
from deepseek_jax.ops.balance import z_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZLoss:
  """Punishes large logits, whose rounding errors change the choice.

  Attributes:
    weight: factor on the loss.

  Source: Zoph et al. (ST-MoE), arXiv 2202.08906, equation 5.
  """

  weight: float = 1e-3

  def __post_init__(self):
    if not self.weight > 0:
      raise ConfigError(f'`weight` is {self.weight}; expected a number above 0, or `z_loss` None')

  def __call__(self, logits: jax.Array, real: jax.Array) -> jax.Array:
    """Returns the weighted loss, summed over sequences; logits [B, T, E], real [B, T]."""
    return self.weight * z_loss(logits, real)
