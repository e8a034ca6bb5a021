"""The sigmoid router of DeepSeek-V3."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe.interface import Assignment
from deepseek_jax.layers.weights import buffer, weight
from deepseek_jax.ops.routing import group_limited_top_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sigmoid:
  """Sigmoid affinities, a selection bias, group-limited top-k, weights renormalised and scaled.

  The bias decides who is chosen and nothing else; the training step moves it against the load, so
  that no auxiliary loss is needed for balance.

  Attributes:
    groups: equal groups of neighbouring experts.
    kept_groups: groups a token may choose from.
    scale: factor on the renormalised weights.

  Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2, equations 12 to 16.
  """

  groups: int = 1
  kept_groups: int = 1
  scale: float = 2.5

  def __post_init__(self):
    errors = []
    if self.groups < 1:
      errors.append(f'`groups` is {self.groups}; expected 1 or more')
    if not 1 <= self.kept_groups <= max(self.groups, 1):
      errors.append(f'`kept_groups` is {self.kept_groups}; expected 1 to `groups` {self.groups}')
    if errors:
      raise ConfigError(errors)

  def check(self, experts: int, top_k: int) -> list[str]:
    """Returns what is wrong with routing to `top_k` of `experts` experts, as messages."""
    if experts % self.groups:
      return [f'`groups` is {self.groups}, which does not divide {experts} experts']
    reachable = experts // self.groups * self.kept_groups
    if top_k > reachable:
      return [f'`kept_groups` {self.kept_groups} leave {reachable} experts to choose {top_k} from']
    return []

  def build(self, experts: int, top_k: int, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return SigmoidRouter(self, experts, top_k, name=name)


class SigmoidRouter(nn.Module):
  """[B, T, D] -> `Assignment` of N = B·T tokens."""

  config: Sigmoid
  experts: int
  top_k: int

  @nn.compact
  def __call__(self, x: jax.Array, context: Context) -> Assignment:
    """Routes `x` [B, T, D]."""
    c = self.config
    # float32 from here to the weights: near-ties between experts must fall the same way in every
    # precision and layout.
    w = weight(self, 'weight', (x.shape[-1], self.experts), ('embed', None), dtype=jnp.float32)
    scores = jax.nn.sigmoid(
      jnp.einsum('btd,de->bte', x.astype(jnp.float32), w).reshape(-1, self.experts)
    )
    bias = buffer(self, 'selection_bias', (self.experts,), (None,))
    experts, picked = group_limited_top_k(
      scores, scores + bias, groups=c.groups, kept_groups=c.kept_groups, top_k=self.top_k
    )
    weights = picked / (jnp.sum(picked, axis=-1, keepdims=True) + 1e-20) * c.scale
    return Assignment(experts=experts, weights=weights, scores=scores)
