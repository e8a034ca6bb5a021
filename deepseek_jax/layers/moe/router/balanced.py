"""A router that gives every expert the same load, whatever the tokens are."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe.interface import Assignment, Limits
from deepseek_jax.ops.routing import deal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balanced:
  """Deals experts to tokens in turn: for measuring the best throughput there can be, not to learn.

  Choice k of token n is expert (n · K + k) mod E, with weight 1 / K; padding has its turn like any
  token. It learns nothing, and has neither logits nor a bias.
  """

  def check(self, experts: int, top_k: int) -> list[str]:
    """Returns what is wrong with routing to `top_k` of `experts` experts: never anything."""
    return []

  def build(self, experts: int, top_k: int, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return BalancedRouter(self, experts, top_k, name=name)


class BalancedRouter(nn.Module):
  """[B, T, D] -> `Assignment` of N = B·T tokens."""

  config: Balanced
  experts: int
  top_k: int

  @nn.compact
  def __call__(self, x: jax.Array, context: Context, limits: Limits | None = None) -> Assignment:
    """Routes `x` [B, T, D]."""
    limits, tokens = limits or Limits(), x.shape[0] * x.shape[1]
    experts, each = deal(tokens, self.experts, self.top_k, limits.allowed, limits.top_k)
    open_to = jnp.ones(self.experts, bool) if limits.allowed is None else limits.allowed
    share = open_to / jnp.maximum(jnp.sum(open_to, dtype=jnp.float32), 1.0)
    return Assignment(
      experts=experts,
      weights=jnp.where(experts < self.experts, 1.0 / jnp.maximum(each, 1), 0.0),
      scores=jnp.broadcast_to(share, (tokens, self.experts)),
    )
