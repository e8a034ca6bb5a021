"""Sliding-window attention with sinks."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.interface import Cache, in_order_only
from deepseek_jax.layers.attention.latent import (
  LATENT_CACHE_AXES,
  Latent,
  LatentAttention,
  LatentCache,
  empty_latent_cache,
)
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.context_parallel import Order
from deepseek_jax.ops.attention.reference import Seen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window(Latent):
  """Latent attention to the last `size` tokens and the first `sinks`.

  Blocks of keys outside are not looked at, in training either; the cache holds only what can still
  be seen.

  Attributes:
    size: tokens in the window, the query's own among them.
    sinks: tokens at the start of the segment that stay visible.

  Source: Xiao et al., arXiv 2309.17453 (sinks).
  """

  size: int = 128
  sinks: int = 4

  def __post_init__(self):
    super().__post_init__()
    if self.size < 1:
      raise ConfigError(f'`size` is {self.size}; a window holds at least the token itself')
    if self.sinks < 0:
      raise ConfigError(f'`sinks` is {self.sinks}; expected 0 or more')

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return WindowAttention(self, name=name)

  def visible_tokens(self, length: int) -> float:
    """Mean number of tokens that a token of a `length`-token segment attends to."""
    ring, sinks = self.size, self.sinks
    return sum(min(t + 1, ring) + min(max(t + 1 - ring, 0), sinks) for t in range(length)) / length

  def check_shared(self, tokens: int, order: Order) -> list[str]:
    """Returns what is wrong with such an order of the tokens of a row, as messages."""
    del tokens
    return in_order_only(order, 'the tokens before its own')

  def empty_cache(self, batch: int, length: int, dtype: DTypeLike, spare: int = 0) -> LatentCache:
    """Returns an empty cache: slots for the sinks, then a ring of `size`; at most `length`."""
    return empty_latent_cache(self, batch, min(self.sinks + self.size + spare, length), dtype)

  def cache_axes(self) -> LatentCache:
    """Returns the logical axes of the cache."""
    return LATENT_CACHE_AXES


class WindowAttention(LatentAttention):
  """[B, T, D] -> [B, T, D], over a cache that forgets what left the window."""

  config: Window

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context, cache: Cache | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Mixes `x` [B, T, D]; see `AttentionConfig.build`."""
    size, sinks = self.config.size, self.config.sinks
    query = self.queries(x, context)
    new = self.latents(x, context)
    positions = context.positions
    if cache is None:
      heads = self.mix_own(query, new, context, (size, sinks))
    else:
      # A block of queries may be longer than the ring: attend to what the ring holds and to the
      # block itself, then write.
      own = jnp.where(context.real, positions, -1)
      # What stands at or after the first of the block was taken back.
      held = jnp.where(cache.positions < positions[:, :1], cache.positions, -1)
      key_positions = jnp.concatenate([held, own], axis=1)
      key = (_extend(cache.latent, new[0]), _extend(cache.rope_key, new[1]))
      cache = cache.write(self.slots(own, cache.positions.shape[1]), *new, positions)
      heads = self.mix_seen(query, key, Seen(positions, key_positions), context, (size, sinks))
    return self.project(heads, x.shape[-1]), cache

  def slots(self, positions: jax.Array, slots: int) -> jax.Array:
    """Returns the slot of each token [B, T]: its sink, or its turn in the ring.

    Tokens that a later one of the same block overwrites, and padding (position -1), get a slot
    beyond the end, so that every slot is written at most once.
    """
    sinks = min(self.config.sinks, slots)
    ring = slots - sinks
    last = jnp.max(positions, axis=1, keepdims=True)
    turn = sinks + (positions - sinks) % max(ring, 1)
    kept = (positions >= sinks) & (positions > last - ring)
    slot = jnp.where(positions < sinks, positions, jnp.where(kept, turn, slots))
    return jnp.where(positions < 0, slots, slot)


def _extend(old: jax.Array, new: jax.Array) -> jax.Array:
  """Puts new tokens [B, T, C] after remembered ones [B, S, C], in the dtype of the latter."""
  return jnp.concatenate([old, new.astype(old.dtype)], axis=1)
