"""A router of two levels: the token and its context ask, embeddings of the experts answer."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention import ring
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe.interface import Assignment, Limits
from deepseek_jax.layers.moe.router.logits import limited_logits
from deepseek_jax.layers.moe.router.noise import Gaussian, Gumbel, Jitter
from deepseek_jax.layers.weights import buffer, table, weight
from deepseek_jax.ops.routing import group_limited_top_k, renormalise
from deepseek_jax.ops.running import segment_sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertAttention:
  """Scaled dot-product attention of each token, joined with its context, to expert embeddings.

  The context is coarse: the mean of the token's own document up to the token itself, so that
  nothing of the future and nothing of another document is in it. With [x ; c] the token and its
  context and e_i learnt embeddings, scores are softmax_i((W_q [x ; c]) · (W_k e_i) / √d). A
  selection bias decides as in `Sigmoid`; weights are renormalised and scaled.

  In generation it remembers, for each row and layer, one sum of d numbers, and as many more as
  tokens can be taken back.

  Attributes:
    dim: size d of queries, keys and expert embeddings.
    scale: factor on the renormalised weights.
    noise: disturbs the choice in training, or None.
  """

  dim: int = 64
  scale: float = 2.5
  noise: Gumbel | Gaussian | Jitter | None = None

  def __post_init__(self):
    if self.dim < 1:
      raise ConfigError(f'`dim` is {self.dim}; expected 1 or more')

  def check(self, experts: int, top_k: int) -> list[str]:
    """Returns what is wrong with routing to `top_k` of `experts` experts: never anything."""
    return []

  def empty_cache(self, batch: int, length: int, dtype: DTypeLike, spare: int = 0) -> jax.Array:
    """Returns what it remembers of `batch` rows without a token.

    Sums and counts after each of the last tokens [B, spare + 1, d + 1], a ring.
    """
    return jnp.zeros((batch, spare + 1, self.dim + 1), jnp.float32)

  def build(self, experts: int, top_k: int, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return ExpertAttentionRouter(self, experts, top_k, name=name)


class ExpertAttentionRouter(nn.Module):
  """[B, T, D] -> `Assignment` of N = B·T tokens, and the cache [B, R, d + 1] if one is given."""

  config: ExpertAttention
  experts: int
  top_k: int

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    context: Context,
    limits: Limits | None = None,
    cache: jax.Array | None = None,
  ) -> Assignment:
    """Routes `x` [B, T, D]."""
    c, limits, float32 = self.config, limits or Limits(), jnp.float32
    width = x.shape[-1]
    query = weight(self, 'query', (2 * width, c.dim), ('embed', None), dtype=float32)
    key = weight(self, 'key', (c.dim, c.dim), (None, None), dtype=float32)
    embedding = table(self, 'embedding', (self.experts, c.dim), ('routed', None), std=1.0)
    keys = embedding @ key
    remembered = []

    def compare(x: jax.Array) -> jax.Array:
      # The mean of projections is the projection of the mean, and has d channels, not D.
      own = jnp.einsum('btd,df->btf', x, query[:width])
      mean, written = running_mean(jnp.einsum('btd,df->btf', x, query[width:]), context, cache)
      remembered.append(written)
      return jnp.einsum('btf,ef->bte', own + mean, keys) / math.sqrt(c.dim)

    logits, deciding = limited_logits(self, x, c.noise, limits, compare)
    softmax = functools.partial(jax.nn.softmax, axis=-1)
    scores = softmax(logits)
    experts, picked = group_limited_top_k(
      scores,
      softmax(deciding) + buffer(self, 'selection_bias', (self.experts,), (None,)),
      top_k=self.top_k,
      allowed=limits.allowed,
      count=limits.top_k,
    )
    return Assignment(
      experts=experts,
      weights=renormalise(picked, c.scale),
      scores=scores,
      logits=logits,
      cache=remembered[0],
    )


def running_mean(
  x: jax.Array, context: Context, cache: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """Means of each token's own document up to the token, itself included.

  Args:
    x: [B, T, C] float32.
    context: facts about the tokens.
    cache: [B, R, C + 1] a ring of the sums and counts after each of the last tokens, for rows that
      go on; or None.

  Returns:
    [B, T, C] float32, and the cache with these tokens in it; padding leaves no trace.
  """
  values = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
  if cache is None:
    sums = segment_sums(values, context.segments)
  else:
    before, places = ring.before(cache, context.positions, 1)
    before = jnp.where(places[..., None] < 0, 0.0, before)
    values = jnp.where(context.real[..., None], values, 0.0)
    sums = before + segment_sums(values, jnp.zeros_like(context.segments))
    cache = ring.write(cache, sums, context.positions, context.real)
  return sums[..., :-1] / jnp.maximum(sums[..., -1:], 1.0), cache
