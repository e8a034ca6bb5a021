"""Multi-head attention, with keys and values of its own for every head or shared by groups."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.layers.attention.interface import Cache
from deepseek_jax.layers.attention.rope import RoPE
from deepseek_jax.layers.attention.shards import attend_sharded
from deepseek_jax.layers.attention.spread import attend_spread
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.context_parallel import Order
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.weights import weight
from deepseek_jax.ops.attention.blocks import Window
from deepseek_jax.ops.attention.reference import Seen
from deepseek_jax.ops.attention.ring import Keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class MHA:
  """Multi-head attention to all tokens before; grouped-query where key heads are fewer.

  Attributes:
    heads: query heads H.
    kv_heads: key and value heads G, each shared by H / G query heads; None where none is shared.
    head_dim: channels of a query, key or value head.
    rope: rotary embedding of queries and keys, or None for no notion of position.
    norm: norm on every query and key head, or None.

  Source: Vaswani et al., arXiv 1706.03762, section 3.2.2; groups: Ainslie et al., arXiv 2305.13245;
    norms: Henry et al., arXiv 2010.04245.
  """

  heads: int
  kv_heads: int | None = None
  head_dim: int = 64
  rope: RoPE | None = RoPE()
  norm: RMSNorm | None = None

  def __post_init__(self):
    errors = wrong_sizes(self, ('heads', 'kv_heads', 'head_dim'))
    if self.kv_heads is not None and self.kv_heads > 0 and self.heads % self.kv_heads:
      errors.append(f'`kv_heads` {self.kv_heads} does not divide `heads` {self.heads}')
    if self.rope is not None and self.head_dim % 2:
      errors.append(f'`head_dim` is {self.head_dim}; rotary pairs need an even number')
    if errors:
      raise ConfigError(errors)

  @property
  def groups(self) -> int:
    """Key heads G."""
    return self.heads if self.kv_heads is None else self.kv_heads

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return MultiHeadAttention(self, name=name)

  def mixing_flops(self, length: int) -> float:
    """Forward FLOPs a token of scores and values over `length` causal tokens, on average."""
    return 4 * self.heads * self.head_dim * (length + 1) / 2

  def check_shared(self, tokens: int, order: Order) -> list[str]:
    """Returns nothing: keys come from everywhere, and positions say which are seen."""
    del tokens, order
    return []

  def empty_cache(self, batch: int, length: int, dtype: DTypeLike, spare: int = 0) -> 'HeadCache':
    """Returns an empty cache of `length` slots; a token's slot is its position."""
    del spare  # A later token is not seen, and is written over when its position comes again.
    return empty_head_cache(batch, length, self.groups, self.head_dim, dtype)

  def cache_axes(self) -> 'HeadCache':
    """Returns the logical axes of the cache."""
    return HEAD_CACHE_AXES


@struct.dataclass
class HeadCache:
  """Keys and values of every key head.

  Attributes:
    key: [B, S, G, K] after norm and rotation, in the compute dtype.
    value: [B, S, G, V].
    positions: [B, S] int32 position of the token in each slot; -1 where there is none.
  """

  key: jax.Array
  value: jax.Array
  positions: jax.Array

  def write(self, slots: jax.Array, key, value, positions) -> 'HeadCache':
    """Puts T tokens in `slots` [B, T]; slots beyond the end are dropped."""
    rows = jnp.arange(slots.shape[0])[:, None]
    put = lambda old, new: old.at[rows, slots].set(new.astype(old.dtype), mode='drop')  # noqa: E731
    return HeadCache(put(self.key, key), put(self.value, value), put(self.positions, positions))


def empty_head_cache(
  batch: int, slots: int, groups: int, dim: int, dtype: DTypeLike, value_dim: int | None = None
) -> HeadCache:
  """Returns a cache of `slots` [B, S] that holds nothing; values are like keys if not said."""
  key = jnp.zeros((batch, slots, groups, dim), dtype)
  value = key if value_dim is None else jnp.zeros((batch, slots, groups, value_dim), dtype)
  return HeadCache(key, value, jnp.full((batch, slots), -1, jnp.int32))


HEAD_CACHE_AXES = HeadCache(
  key=('batch', 'cache_length', 'act_heads', None),  # type: ignore[arg-type]
  value=('batch', 'cache_length', 'act_heads', None),  # type: ignore[arg-type]
  positions=('batch', 'cache_length'),  # type: ignore[arg-type]
)


class HeadAttention(nn.Module):
  """Projections to heads and back; kinds derive from it and say who sees whom."""

  def heads(self, x: jax.Array, name: str, count: int, dim: int, context: Context) -> jax.Array:
    """Projects [B, T, D] to heads [B, T, H, K]."""
    w = weight(self, name, (x.shape[-1], count, dim), ('embed', 'heads', None), dtype=x.dtype)
    y = jnp.einsum('btd,dhk->bthk', x, w)
    return context.rules.constrain(y, ('batch', 'seq', 'act_heads', None))

  def attend(self, query: jax.Array, key, value, seen: Seen, context: Context) -> jax.Array:
    """Mixes values [B, S, G, K] for queries [B, T, H, K]; see `attend_sharded`."""
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    scale = query.shape[-1] ** -0.5
    return attend_sharded(query, key, value, seen, context.rules, scale=scale)

  def attend_own(
    self, query: jax.Array, key, value, context: Context, window: Window | None = None
  ) -> jax.Array:
    """Mixes values [B, T, G, K] of the queries' own tokens [B, T, H, K], of those before each."""
    facts: dict[str, Any] = {'scale': query.shape[-1] ** -0.5, 'window': window}
    heads = attend_spread(query, Keys((key, value), (), as_they_are), context, **facts)
    if heads is not None:
      return heads
    arrays = query, key, value, context.own()
    return attend_sharded(*arrays, context.rules, in_order=True, **facts)

  def project(self, mixed: jax.Array, width: int, context: Context) -> jax.Array:
    """Brings head outputs [B, T, H, K] back to [B, T, D]."""
    mixed = context.rules.constrain(mixed, ('batch', 'seq', 'act_heads', None))
    shape, axes = (*mixed.shape[2:], width), ('heads', None, 'embed')
    w = weight(self, 'output', shape, axes, dtype=mixed.dtype, inputs=2)
    return jnp.einsum('bthk,hkd->btd', mixed, w)


def as_they_are(source: tuple[jax.Array, jax.Array], weights: Any) -> tuple[jax.Array, jax.Array]:
  """Returns keys [B, S, G, K] and values [B, S, G, V] that are made already."""
  del weights
  return source


class MultiHeadAttention(HeadAttention):
  """[B, T, D] -> [B, T, D], over a cache of the keys and values of every key head."""

  config: MHA

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context, cache: Cache | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Mixes `x` [B, T, D]; see `AttentionConfig.build`."""
    c, positions = self.config, context.positions
    query = self.heads(x, 'query', c.heads, c.head_dim, context)
    key = self.heads(x, 'key', c.groups, c.head_dim, context)
    value = self.heads(x, 'value', c.groups, c.head_dim, context)
    if c.norm is not None:
      query, key = c.norm.build('query_norm')(query), c.norm.build('key_norm')(key)
    if c.rope is not None:
      query, key = c.rope.rotate(query, positions), c.rope.rotate(key, positions)
    if cache is None:
      mixed = self.attend_own(query, key, value, context)
    else:
      slots = context.slots(cache.positions.shape[1])
      cache = cache.write(slots, key, value, positions)
      seen = Seen(positions, cache.positions)
      mixed = self.attend(query, cache.key, cache.value, seen, context)
    return self.project(mixed, x.shape[-1], context), cache
