"""What the matrices of the routed experts are made of."""

import dataclasses

import flax.linen as nn
from jax.typing import DTypeLike

from deepseek_jax.layers.weights import weight
from deepseek_jax.ops.experts import ExpertWeights

INWARD = ('expert', 'expert_embed', 'expert_mlp')
OUTWARD = ('expert', 'expert_mlp', 'expert_embed')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Separate:
  """Every expert has matrices of its own.

  Source: DeepSeekMoE, arXiv 2401.06066, section 3.
  """

  def matrices(
    self, module: nn.Module, experts: int, width: int, hidden: int, dtype: DTypeLike
  ) -> ExpertWeights:
    """Declares the weights in `module`: gate and up [E, D, F], down [E, F, D]."""
    return ExpertWeights(
      gate=weight(module, 'gate', (experts, width, hidden), INWARD, dtype=dtype),
      up=weight(module, 'up', (experts, width, hidden), INWARD, dtype=dtype),
      down=weight(module, 'down', (experts, hidden, width), OUTWARD, dtype=dtype),
    )
