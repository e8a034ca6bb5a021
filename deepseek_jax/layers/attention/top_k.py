"""Attention of each token to the few tokens that it scores highest."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.chosen import Chosen, ChosenAttention
from deepseek_jax.layers.attention.interface import Cache
from deepseek_jax.layers.attention.latent import (
  LATENT_CACHE_AXES,
  Latent,
  LatentCache,
  empty_latent_cache,
)
from deepseek_jax.layers.attention.spread import choose_spread
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.context_parallel import Order
from deepseek_jax.ops.attention.reference import Seen
from deepseek_jax.ops.attention.select import select_nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(Latent):
  """Latent attention of every token to the `top_k` visible tokens that its heads score highest.

  A token has one set for all of its heads, chosen by the mean of their own scores. In the latent
  space that mean is a single product of C + R channels, so that looking at all pairs costs
  2 (C + R) FLOPs each, 1 / H of what absorbed scores cost; it still grows with the square of the
  length. Nothing is learnt for the choice, and no gradient flows through it.

  Attributes:
    top_k: tokens that each token attends to; where it sees fewer, it attends to them all.

  Source: Gupta et al., arXiv 2106.06899, section 2, where every head chooses for itself.
  """

  top_k: int = 32

  def __post_init__(self):
    super().__post_init__()
    if self.top_k < 1:
      raise ConfigError(f'`top_k` is {self.top_k}; expected 1 or more')

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return TopKAttention(self, name=name)

  def visible_tokens(self, length: int) -> float:
    """Mean number of tokens that a token of a `length`-token segment attends to."""
    return sum(min(t + 1, self.top_k) for t in range(length)) / length

  def mixing_flops(self, length: int) -> float:
    """Forward FLOPs a token: one product with every visible token, and absorbed attention."""
    per_pair = 2 * self.heads * (2 * self.latent + self.rope_dim)
    choice = 2 * (self.latent + self.rope_dim) * (length + 1) / 2
    return choice + per_pair * self.visible_tokens(length)

  def check_shared(self, tokens: int, order: Order) -> list[str]:
    """Returns nothing: keys come from everywhere, and positions say which are seen."""
    del tokens, order
    return []

  def empty_cache(self, batch: int, length: int, dtype: DTypeLike, spare: int = 0) -> LatentCache:
    """Returns an empty cache of `length` slots; a token's slot is its position."""
    del spare  # A later token is not seen, and is written over when its position comes again.
    return empty_latent_cache(self, batch, length, dtype)

  def cache_axes(self) -> LatentCache:
    """Returns the logical axes of the cache."""
    return LATENT_CACHE_AXES


class TopKAttention(ChosenAttention):
  """[B, T, D] -> [B, T, D], over the cache of MLA."""

  config: TopK

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context, cache: Cache | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Mixes `x` [B, T, D]; see `AttentionConfig.build`."""
    c = self.config
    query = self.unmade_queries(x, context)
    key = self.latents(x, context)
    up = self.up(x.dtype)
    if cache is None:
      seen = context.own()
    else:
      slots = context.slots(cache.positions.shape[1])
      cache = cache.write(slots, *key, context.positions)
      key = (cache.latent, cache.rope_key)
      seen = Seen(context.positions, cache.positions)
    # Σ_h q_h · k_h: the heads' queries are summed in the latent space, where their keys are one.
    nope, rope = query.make(c)
    inner = jnp.einsum('bthk,chk->btc', nope, up[..., : c.nope_dim])
    whole = jnp.concatenate([inner, jnp.sum(rope, axis=2)], axis=-1)
    key = (key[0].astype(x.dtype), key[1].astype(x.dtype))
    top_k = min(c.top_k, key[0].shape[1])

    def select(whole, key, seen, ordered):
      rows = jnp.concatenate(key, axis=-1)
      return select_nearest(whole, rows, seen, top_k, ordered=ordered)

    if cache is None:
      found = choose_spread(select, whole, key, seen, context)
    else:
      found = select(whole, key, seen, False)
    matrices = up, self.output_matrix(x.shape[-1], x.dtype)
    y, _ = self.mix_chosen(query, key, matrices, Chosen((found,)), context)
    return y, cache
