"""The hash router: the token's id alone chooses its experts."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe.interface import Assignment, Limits
from deepseek_jax.layers.moe.router.logits import expert_logits
from deepseek_jax.layers.moe.router.table import ByFrequency, Random, TableFile
from deepseek_jax.layers.weights import buffer
from deepseek_jax.ops.routing import group_limited_top_k, preference, renormalise, sqrt_softplus


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hash:
  """A table from token ids to experts, and learnt √softplus weights, renormalised and scaled.

  Who is chosen is never learnt, so nothing can collapse; how much each chosen expert counts is. In
  the place of an expert that may not be chosen stands the next one that may.

  Attributes:
    vocab: entries V of the model's vocabulary.
    table: where the table comes from; then it is a buffer of the model, [V, K] int32.
    scale: factor on the renormalised weights.

  Source: Roller et al., arXiv 2106.04426; DeepSeek-V4, arXiv 2606.19348, its section on mixture of
    experts (the first layers).
  """

  vocab: int
  table: Random | ByFrequency | TableFile = Random()
  scale: float = 1.5

  def __post_init__(self):
    if self.vocab < 1:
      raise ConfigError(f'`vocab` is {self.vocab}; expected 1 or more')

  def check(self, experts: int, top_k: int) -> list[str]:
    """Returns what is wrong with routing to `top_k` of `experts` experts: never anything."""
    return []

  def check_model(self, vocab: int, experts: int, top_k: int) -> list[str]:
    """Returns what is wrong in a model with `vocab` tokens, as messages; reads the table's file."""
    if vocab != self.vocab:
      return [f'`vocab` is {self.vocab}, but the model has {vocab} tokens']
    return [f'table: {message}' for message in self.table.faults(vocab, experts, top_k)]

  def build(self, experts: int, top_k: int, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return HashRouter(self, experts, top_k, name=name)


class HashRouter(nn.Module):
  """[B, T, D] -> `Assignment` of N = B·T tokens."""

  config: Hash
  experts: int
  top_k: int

  @nn.compact
  def __call__(self, x: jax.Array, context: Context, limits: Limits | None = None) -> Assignment:
    """Routes `x` [B, T, D]."""
    c = self.config
    logits, _ = expert_logits(self, x, self.experts, None, limits or Limits())
    scores = sqrt_softplus(logits)
    shape = (c.vocab, self.top_k)
    table = buffer(
      self,
      'table',
      shape,
      (None, None),
      lambda: c.table.draw(self.make_rng('params'), c.vocab, self.experts, self.top_k),
    )
    experts = jnp.take(table, context.tokens.reshape(-1), axis=0, mode='clip')
    if limits is None:
      picked = jnp.take_along_axis(scores, experts, axis=-1)
    else:
      experts, picked = group_limited_top_k(
        scores,
        preference(experts, self.experts),
        top_k=self.top_k,
        allowed=limits.allowed,
        count=limits.top_k,
      )
    return Assignment(
      experts=experts, weights=renormalise(picked, c.scale), scores=scores, logits=logits
    )
