"""Auxiliary losses that even out the load of experts."""

import dataclasses

import jax

from deepseek_jax.core.config import ConfigError
from deepseek_jax.ops.balance import batch_balance, sequence_balance


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceBalance:
  """Keeps the load even within each sequence.

  Attributes:
    weight: factor α on the loss; small, since the router's bias does the main work.

  Source: DeepSeek-V3, arXiv 2412.19437, equations 17 to 20.
  """

  weight: float = 1e-4

  def __post_init__(self):
    _check_weight(self.weight)

  def __call__(self, scores: jax.Array, real: jax.Array, top_k: int) -> jax.Array:
    """Returns the weighted loss, summed over sequences; scores [B, T, E], real [B, T]."""
    return self.weight * sequence_balance(scores, real, top_k)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchBalance:
  """Keeps the load even over the whole batch; sequences may specialise.

  With accumulation, the batch is one microbatch.

  Attributes:
    weight: factor on the loss.

  Source: Qiu et al., arXiv 2501.11873, equation 4.
  """

  weight: float = 1e-2

  def __post_init__(self):
    _check_weight(self.weight)

  def __call__(self, scores: jax.Array, real: jax.Array, top_k: int) -> jax.Array:
    """Returns the weighted loss times the number of sequences; scores [B, T, E], real [B, T]."""
    return self.weight * batch_balance(scores, real, top_k)


def _check_weight(weight: float) -> None:
  if not weight > 0:
    raise ConfigError(f'`weight` is {weight}; expected a number above 0, or `balance` None')
