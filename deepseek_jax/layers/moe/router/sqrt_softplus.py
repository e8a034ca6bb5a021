"""The router of DeepSeek-V4."""

import dataclasses

import flax.linen as nn
import jax

from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe.interface import Assignment, Limits
from deepseek_jax.layers.moe.router.logits import expert_logits
from deepseek_jax.layers.moe.router.noise import Gaussian, Gumbel, Jitter
from deepseek_jax.layers.weights import buffer
from deepseek_jax.ops.routing import group_limited_top_k, renormalise, sqrt_softplus


@dataclasses.dataclass(frozen=True, kw_only=True)
class SqrtSoftplus:
  """√softplus affinities, a selection bias, top-k of all experts, weights renormalised and scaled.

  Unlike a sigmoid's, an affinity has no upper end.

  Attributes:
    scale: factor on the renormalised weights (V4-Flash 1.5, V4-Pro 2.5).
    noise: disturbs the choice in training, or None.

  Source: DeepSeek-V4, arXiv 2606.19348, its section on mixture of experts.
  """

  scale: float = 1.5
  noise: Gumbel | Gaussian | Jitter | None = None

  def check(self, experts: int, top_k: int) -> list[str]:
    """Returns what is wrong with routing to `top_k` of `experts` experts: never anything."""
    return []

  def build(self, experts: int, top_k: int, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return SqrtSoftplusRouter(self, experts, top_k, name=name)


class SqrtSoftplusRouter(nn.Module):
  """[B, T, D] -> `Assignment` of N = B·T tokens."""

  config: SqrtSoftplus
  experts: int
  top_k: int

  @nn.compact
  def __call__(self, x: jax.Array, context: Context, limits: Limits | None = None) -> Assignment:
    """Routes `x` [B, T, D]."""
    c, limits = self.config, limits or Limits()
    logits, deciding = expert_logits(self, x, self.experts, c.noise, limits)
    scores = sqrt_softplus(logits)
    experts, picked = group_limited_top_k(
      scores,
      sqrt_softplus(deciding) + buffer(self, 'selection_bias', (self.experts,), (None,)),
      top_k=self.top_k,
      allowed=limits.allowed,
      count=limits.top_k,
    )
    return Assignment(
      experts=experts, weights=renormalise(picked, c.scale), scores=scores, logits=logits
    )
