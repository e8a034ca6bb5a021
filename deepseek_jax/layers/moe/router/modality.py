"""The sigmoid router with a selection bias for each modality."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.layers.context import MODALITIES, Context
from deepseek_jax.layers.moe.router.sigmoid import Sigmoid, SigmoidRouter
from deepseek_jax.layers.weights import buffer


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


class ModalityRouter(SigmoidRouter):
  """[B, T, D] -> `Assignment` of N = B·T tokens."""

  def selection_bias(self, context: Context) -> jax.Array:
    """Returns what is added to the scores that decide: [N, E] float32."""
    modality = jnp.zeros_like(context.tokens) if context.modality is None else context.modality
    return ModalityBias(self.experts, name='modality')(modality)
