"""The softmax router of DeepSeekMoE and DeepSeek-V2."""

import dataclasses

import flax.linen as nn
import jax

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe.interface import Assignment, Limits
from deepseek_jax.layers.moe.router.group import group_faults, reach_faults
from deepseek_jax.layers.moe.router.logits import expert_logits
from deepseek_jax.layers.moe.router.noise import Gaussian, Gumbel, Jitter
from deepseek_jax.ops.routing import best_one, group_limited_top_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softmax:
  """Softmax probabilities that choose and weigh as they are; no bias, no renormalisation.

  Balance is the work of auxiliary losses (`MoE.balance`): there is no bias for a rule to move.
  Among experts that are allowed alone, probabilities sum to 1.

  Attributes:
    groups: equal groups of neighbouring experts; 1 is the greedy choice of V1 and V2-Lite.
    kept_groups: groups a token may choose from, those with the likeliest experts (V2: 3 of 8).
    scale: factor on the weights (V2: 16).
    noise: disturbs the choice in training, or None.

  Source: DeepSeekMoE, arXiv 2401.06066, equations 9 to 11; DeepSeek-V2, arXiv 2405.04434, section
    2.2.2.
  """

  groups: int = 1
  kept_groups: int = 1
  scale: float = 1.0
  noise: Gumbel | Gaussian | Jitter | None = None

  def __post_init__(self):
    errors = group_faults(self.groups, self.kept_groups)
    if errors:
      raise ConfigError(errors)

  def check(self, experts: int, top_k: int) -> list[str]:
    """Returns what is wrong with routing to `top_k` of `experts` experts, as messages."""
    return reach_faults(self.groups, self.kept_groups, experts, top_k)

  def build(self, experts: int, top_k: int, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return SoftmaxRouter(self, experts, top_k, name=name)


class SoftmaxRouter(nn.Module):
  """[B, T, D] -> `Assignment` of N = B·T tokens."""

  config: Softmax
  experts: int
  top_k: int

  @nn.compact
  def __call__(self, x: jax.Array, context: Context, limits: Limits | None = None) -> Assignment:
    """Routes `x` [B, T, D]."""
    c, limits = self.config, limits or Limits()
    logits, deciding = expert_logits(self, x, self.experts, c.noise, limits)
    scores = jax.nn.softmax(logits, axis=-1)
    experts, picked = group_limited_top_k(
      scores,
      jax.nn.softmax(deciding, axis=-1),
      groups=c.groups,
      kept_groups=c.kept_groups,
      top_k=self.top_k,
      group_score=best_one,
      allowed=limits.allowed,
      count=limits.top_k,
    )
    return Assignment(experts=experts, weights=picked * c.scale, scores=scores, logits=logits)
