"""Attention to a second stream: what an encoder made, or any other memory."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.layers.attention.interface import Cache
from deepseek_jax.layers.attention.mha import (
  HEAD_CACHE_AXES,
  HeadAttention,
  HeadCache,
  empty_head_cache,
)
from deepseek_jax.layers.context import Context
from deepseek_jax.ops.attention.reference import Seen


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossAttention:
  """Multi-head attention from the tokens to `context.memory`.

  A token sees all of the memory that has its segment. The memory's order is not known here:
  positions are the business of what makes it. A cache keeps the memory's keys and values, so that
  the memory is given with a sequence's first tokens alone.

  Attributes:
    heads: heads H.
    head_dim: channels of a query, key or value head.
    slots: longest memory that a cache holds, in vectors.

  Source: Vaswani et al., arXiv 1706.03762, section 3.2.3.
  """

  heads: int
  head_dim: int = 64
  slots: int = 256

  def __post_init__(self):
    errors = wrong_sizes(self, ('heads', 'head_dim', 'slots'))
    if errors:
      raise ConfigError(errors)

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return CrossHeadAttention(self, name=name)

  def mixing_flops(self, length: int) -> float:
    """Forward FLOPs a token of scores and values over `slots` vectors, whatever `length` is."""
    return 4 * self.heads * self.head_dim * self.slots

  def empty_cache(self, batch: int, length: int, dtype: DTypeLike, spare: int = 0) -> HeadCache:
    """Returns an empty cache of `slots`; it does not grow with the sequence."""
    del length, spare  # No token is written to it.
    return empty_head_cache(batch, self.slots, self.heads, self.head_dim, dtype)

  def cache_axes(self) -> HeadCache:
    """Returns the logical axes of the cache."""
    return HEAD_CACHE_AXES


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderedCross(CrossAttention):
  """Cross-attention in which a token sees only the memory that does not lie after it.

  The memory's positions are those of its segment's tokens. So a picture is seen by the words after
  it and by no word before, and what is generated later changes nothing earlier.

  Attributes:
    heads: heads H.
    head_dim: channels of a query, key or value head.
    slots: longest memory that a cache holds, in vectors.
  """

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return OrderedCrossAttention(self, name=name)


class CrossHeadAttention(HeadAttention):
  """[B, T, D] -> [B, T, D], by what `context.memory` or the cache holds."""

  config: CrossAttention

  def places(self, positions: jax.Array) -> jax.Array:
    """Returns what of positions [B, T] counts: nothing, so that nothing comes after anything."""
    return jnp.zeros_like(positions)

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context, cache: Cache | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Mixes `x` [B, T, D]; see `AttentionConfig.build`.

    Raises:
      ConfigError: there is no memory, or more of it than the cache has room for.
    """
    c, memory = self.config, context.memory
    query = self.heads(x, 'query', c.heads, c.head_dim, context)
    places = self.places(context.positions)
    if memory is None:
      if cache is None:
        raise ConfigError(
          'CrossAttention attends to `context.memory`, which is None: give the context a '
          'Memory(values, positions, segments), or a cache that was filled with one'
        )
      mixed = self.attend(query, cache.key, cache.value, Seen(places, cache.positions), context)
      return self.project(mixed, x.shape[-1], context), cache
    values = memory.values.astype(x.dtype)
    key = self.heads(values, 'key', c.heads, c.head_dim, context)
    value = self.heads(values, 'value', c.heads, c.head_dim, context)
    slots = jnp.where(memory.segments > 0, self.places(memory.positions), -1)
    if cache is not None:
      cache = self.remember(cache, key, value, slots)
    seen = Seen(places, slots, context.segments, memory.segments)
    mixed = self.attend(query, key, value, seen, context)
    return self.project(mixed, x.shape[-1], context), cache

  def remember(self, cache: Cache, key, value, slots: jax.Array) -> HeadCache:
    """Puts keys and values [B, S, H, K] in place of what the cache held."""
    count, room = key.shape[1], cache.positions.shape[1]
    if count > room:
      raise ConfigError(
        f'a memory of {count} vectors does not fit into {room} `slots` of the cache'
      )
    pad = lambda new, fill: jnp.pad(  # noqa: E731
      new, [(0, 0), (0, room - count)] + [(0, 0)] * (new.ndim - 2), constant_values=fill
    )
    return HeadCache(
      pad(key, 0).astype(cache.key.dtype), pad(value, 0).astype(cache.value.dtype), pad(slots, -1)
    )


class OrderedCrossAttention(CrossHeadAttention):
  """[B, T, D] -> [B, T, D], by what `context.memory` or the cache holds up to each token."""

  config: OrderedCross

  def places(self, positions: jax.Array) -> jax.Array:
    """Returns positions [B, T] as they are."""
    return positions
