"""The sigmoid router with a selection bias for each modality."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.layers.context import MODALITIES, Context
from deepseek_jax.layers.moe.interface import Assignment, Limits
from deepseek_jax.layers.moe.router.logits import expert_logits
from deepseek_jax.layers.moe.router.sigmoid import Sigmoid
from deepseek_jax.layers.weights import buffer
from deepseek_jax.ops.routing import group_limited_top_k, renormalise


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModalitySigmoid(Sigmoid):
  """`Sigmoid` with a selection bias for the tokens of each modality.

  One bias for all balances their sum: the experts that pictures crowd into are made up for by
  words that stay away from them. With one each, the training step evens out the load of every
  modality by itself; rates and rule are those of `Experiment.balance`.

  Attributes:
    groups: equal groups of neighbouring experts.
    kept_groups: groups a token may choose from.
    scale: factor on the renormalised weights.
    noise: disturbs the choice in training, or None.
  """

  def build(self, experts: int, top_k: int, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return ModalityRouter(self, experts, top_k, name=name)


class ModalityBias(nn.Module):
  """[B, T] modalities -> [N, E] float32, what is added to the scores that decide."""

  experts: int

  @nn.compact
  def __call__(self, modality: jax.Array) -> jax.Array:
    """Looks up the bias of `modality` [B, T]."""
    shape = (len(MODALITIES), self.experts)
    # By its name, the rule of balance finds it, and the load beside it.
    return buffer(self, 'selection_bias', shape, (None, None))[modality.reshape(-1)]


class ModalityRouter(nn.Module):
  """[B, T, D] -> `Assignment` of N = B·T tokens."""

  config: ModalitySigmoid
  experts: int
  top_k: int

  @nn.compact
  def __call__(self, x: jax.Array, context: Context, limits: Limits | None = None) -> Assignment:
    """Routes `x` [B, T, D]."""
    c, limits = self.config, limits or Limits()
    logits, deciding = expert_logits(self, x, self.experts, c.noise, limits)
    scores = jax.nn.sigmoid(logits)
    modality = jnp.zeros_like(context.tokens) if context.modality is None else context.modality
    experts, picked = group_limited_top_k(
      scores,
      jax.nn.sigmoid(deciding) + ModalityBias(self.experts, name='modality')(modality),
      groups=c.groups,
      kept_groups=c.kept_groups,
      top_k=self.top_k,
      allowed=limits.allowed,
      count=limits.top_k,
    )
    return Assignment(
      experts=experts, weights=renormalise(picked, c.scale), scores=scores, logits=logits
    )
