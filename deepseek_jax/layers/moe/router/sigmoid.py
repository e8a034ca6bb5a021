"""The sigmoid router of DeepSeek-V3."""

import dataclasses

import flax.linen as nn
import jax

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe.interface import Assignment, Limits
from deepseek_jax.layers.moe.router.group import group_faults, reach_faults
from deepseek_jax.layers.moe.router.logits import expert_logits
from deepseek_jax.layers.moe.router.noise import Gaussian, Gumbel, Jitter
from deepseek_jax.layers.weights import buffer
from deepseek_jax.ops.routing import group_limited_top_k, renormalise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sigmoid:
  """Sigmoid affinities, a selection bias, group-limited top-k, weights renormalised and scaled.

  The bias decides who is chosen and nothing else; the training step moves it against the load, so
  that no auxiliary loss is needed for balance.

  Attributes:
    groups: equal groups of neighbouring experts.
    kept_groups: groups a token may choose from.
    scale: factor on the renormalised weights.
    noise: disturbs the choice in training, or None.

  Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2, equations 12 to 16.
  """

  groups: int = 1
  kept_groups: int = 1
  scale: float = 2.5
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
    return SigmoidRouter(self, experts, top_k, name=name)


class SigmoidRouter(nn.Module):
  """[B, T, D] -> `Assignment` of N = B·T tokens."""

  config: Sigmoid
  experts: int
  top_k: int

  def selection_bias(self, context: Context) -> jax.Array:
    """Returns what is added to the scores that decide: float32 [E], or [N, E]."""
    del context
    return buffer(self, 'selection_bias', (self.experts,), (None,))

  @nn.compact
  def __call__(self, x: jax.Array, context: Context, limits: Limits | None = None) -> Assignment:
    """Routes `x` [B, T, D]."""
    c, limits = self.config, limits or Limits()
    logits, deciding = expert_logits(self, x, self.experts, c.noise, limits)
    scores = jax.nn.sigmoid(logits)
    experts, picked = group_limited_top_k(
      scores,
      jax.nn.sigmoid(deciding) + self.selection_bias(context),
      groups=c.groups,
      kept_groups=c.kept_groups,
      top_k=self.top_k,
      allowed=limits.allowed,
      count=limits.top_k,
    )
    return Assignment(
      experts=experts, weights=renormalise(picked, c.scale), scores=scores, logits=logits
    )
