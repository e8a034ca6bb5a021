"""Latent projections that the attention kinds of this family share, and MLA itself."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.interface import Cache
from deepseek_jax.layers.attention.rope import RoPE
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.weights import weight
from deepseek_jax.ops.attention.causal import attend_causal
from deepseek_jax.ops.attention.reference import attend, attend_latent, visible


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent:
  """Sizes of latent projections; kinds that derive from it have the same weights.

  So one kind can be put in the place of another in a trained model.

  Attributes:
    heads: query heads H.
    nope_dim: channels of a query or key head that carry no position.
    rope_dim: channels that are rotated; the key's are shared by all heads.
    value_dim: channels of a value head.
    latent: channels C of the key-value latent.
    query_latent: channels of the query latent, or None for a direct projection.
    rope: rotary embedding.
    norm: norm on both latents.
  """

  heads: int
  nope_dim: int = 128
  rope_dim: int = 64
  value_dim: int = 128
  latent: int = 512
  query_latent: int | None = None
  rope: RoPE = RoPE()
  norm: RMSNorm = RMSNorm()

  def __post_init__(self):
    sizes = ('heads', 'nope_dim', 'rope_dim', 'value_dim', 'latent', 'query_latent')
    errors = [
      f'`{name}` is {size}; expected 1 or more'
      for name in sizes
      if (size := getattr(self, name)) is not None and size < 1
    ]
    if self.rope_dim % 2:
      errors.append(f'`rope_dim` is {self.rope_dim}; rotary pairs need an even number')
    if errors:
      raise ConfigError(errors)

  @property
  def softmax_scale(self) -> float:
    """Factor on the scores: key dim^-½, times YaRN's squared magnitude."""
    return (self.nope_dim + self.rope_dim) ** -0.5 * self.rope.softmax_factor

  def mixing_flops(self, length: int) -> float:
    """Forward FLOPs a token of scores and values over `length` causal tokens, on average."""
    per_pair = 2 * self.heads * (self.nope_dim + self.rope_dim + self.value_dim)
    return per_pair * self.visible_tokens(length)

  def visible_tokens(self, length: int) -> float:
    """Mean number of tokens that a token of a `length`-token segment attends to."""
    return (length + 1) / 2


@struct.dataclass
class LatentCache:
  """What latent attention remembers of each token.

  Attributes:
    latent: [B, S, C] normalised latent, in the compute dtype.
    rope_key: [B, S, R] rotated shared key.
    positions: [B, S] int32 position of the token in each slot; -1 where there is none.
  """

  latent: jax.Array
  rope_key: jax.Array
  positions: jax.Array

  def write(self, slots: jax.Array, latent, rope_key, positions) -> 'LatentCache':
    """Puts T tokens in `slots` [B, T]; slots beyond the end are dropped."""
    rows = jnp.arange(slots.shape[0])[:, None]
    return LatentCache(
      latent=self.latent.at[rows, slots].set(latent.astype(self.latent.dtype), mode='drop'),
      rope_key=self.rope_key.at[rows, slots].set(rope_key.astype(self.rope_key.dtype), mode='drop'),
      positions=self.positions.at[rows, slots].set(positions, mode='drop'),
    )


def empty_latent_cache(config: Latent, batch: int, slots: int, dtype: DTypeLike) -> LatentCache:
  """Returns a latent cache of `slots` [B, S] that holds nothing."""
  return LatentCache(
    latent=jnp.zeros((batch, slots, config.latent), dtype),
    rope_key=jnp.zeros((batch, slots, config.rope_dim), dtype),
    positions=jnp.full((batch, slots), -1, jnp.int32),
  )


LATENT_CACHE_AXES = LatentCache(
  latent=('batch', 'cache_length', None),  # type: ignore[arg-type]
  rope_key=('batch', 'cache_length', None),  # type: ignore[arg-type]
  positions=('batch', 'cache_length'),  # type: ignore[arg-type]
)


class LatentAttention(nn.Module):
  """Projections of latent attention; kinds derive from it and say who sees whom.

  Source: DeepSeek-V2, arXiv 2405.04434, section 2.1, equations 37 to 47.
  """

  config: Latent

  def queries(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
    """Returns queries without position [B, T, H, nope] and rotated ones [B, T, H, R]."""
    c, width = self.config, x.shape[-1]
    head = c.nope_dim + c.rope_dim
    if c.query_latent is None:
      w = weight(self, 'query', (width, c.heads, head), ('embed', 'heads', None), dtype=x.dtype)
      q = jnp.einsum('btd,dhk->bthk', x, w)
    else:
      down = weight(self, 'query_down', (width, c.query_latent), ('embed', None), dtype=x.dtype)
      latent = c.norm.build('query_norm')(jnp.einsum('btd,dc->btc', x, down))
      shape = (c.query_latent, c.heads, head)
      up = weight(self, 'query_up', shape, ('latent', 'heads', None), dtype=x.dtype)
      q = jnp.einsum('btc,chk->bthk', latent, up)
    q = context.rules.constrain(q, ('batch', 'seq', 'act_heads', None))
    return q[..., : c.nope_dim], c.rope.rotate(q[..., c.nope_dim :], context.positions)

  def latents(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
    """Returns the normalised latent [B, T, C] and the rotated shared key [B, T, R]."""
    c, width = self.config, x.shape[-1]
    shape = (width, c.latent + c.rope_dim)
    down = weight(self, 'latent_down', shape, ('embed', None), dtype=x.dtype)
    both = jnp.einsum('btd,dc->btc', x, down)
    latent = c.norm.build('latent_norm')(both[..., : c.latent])
    # The rotated key is not normalised: its length is what the model learns position by.
    return latent, c.rope.rotate(both[..., c.latent :], context.positions)

  def mix(
    self,
    query,
    key,
    mask: jax.Array,
    context: Context,
    bias: jax.Array | None = None,
    causal: bool = False,
  ) -> jax.Array:
    """Attends from T queries to S tokens.

    Expanded (keys and values of every head are made) or absorbed (queries go to the latent
    space), whichever costs fewer FLOPs: a static choice by T and S.

    Args:
      query: the pair that `queries` returns.
      key: the pair that `latents` returns, or what a cache remembers of it.
      mask: [B, T, S] bool.
      context: facts about the T tokens.
      bias: [B, T, S] float32 added to the scores of every head, or None.
      causal: whether the S tokens are the T tokens, in order, and the mask hides later ones.

    Returns:
      [B, T, H, V] outputs of the heads, for `project`.
    """
    c = self.config
    (query_nope, query_rope), (latent, rope_key) = query, key
    shape = (c.latent, c.heads, c.nope_dim + c.value_dim)
    up = weight(self, 'key_value_up', shape, ('latent', 'heads', None), dtype=query_nope.dtype)
    latent, rope_key = latent.astype(up.dtype), rope_key.astype(up.dtype)
    queries, keys = mask.shape[1:]
    if absorbing_is_cheaper(c, queries, keys):
      up_key, up_value = up[..., : c.nope_dim], up[..., c.nope_dim :]
      query_latent = jnp.einsum('bthk,chk->bthc', query_nope, up_key)
      mixed = attend_latent(
        query_latent, query_rope, latent, rope_key, mask, scale=c.softmax_scale, bias=bias
      )
      heads = jnp.einsum('bthc,chv->bthv', mixed, up_value)
    else:
      # One product for keys and values: it runs faster than two half as wide.
      both = jnp.einsum('bsc,chk->bshk', latent, up)
      key_nope, value = both[..., : c.nope_dim], both[..., c.nope_dim :]
      shared = jnp.broadcast_to(rope_key[:, :, None], (*key_nope.shape[:3], c.rope_dim))
      whole_query = jnp.concatenate([query_nope, query_rope], axis=-1)
      whole_key = jnp.concatenate([key_nope, shared], axis=-1)
      if causal and bias is None:
        heads = attend_causal(whole_query, whole_key, value, mask, c.softmax_scale)
      else:
        heads = attend(whole_query, whole_key, value, mask, scale=c.softmax_scale, bias=bias)
    return context.rules.constrain(heads, ('batch', 'seq', 'act_heads', None))

  def project(self, heads: jax.Array, width: int) -> jax.Array:
    """Brings head outputs [B, T, H, V] back to [B, T, D]."""
    shape = (self.config.heads, self.config.value_dim, width)
    axes = ('heads', None, 'embed')
    w = weight(self, 'output', shape, axes, dtype=heads.dtype, inputs=2)
    return jnp.einsum('bthv,hvd->btd', heads, w)


def absorbing_is_cheaper(config: Latent, queries: int, keys: int) -> bool:
  """Compares the FLOPs of absorbed and expanded attention of T queries over S tokens."""
  c = config
  up = c.latent * c.heads * (c.nope_dim + c.value_dim)
  expanded = keys * up + queries * keys * c.heads * (c.nope_dim + c.rope_dim + c.value_dim)
  absorbed = queries * up + queries * keys * c.heads * (2 * c.latent + c.rope_dim)
  return absorbed < expanded


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLA(Latent):
  """Multi-head latent attention: every token sees all tokens before it.

  Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, arXiv 2412.19437, section 2.1.1.
  """

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return MLAttention(self, name=name)

  def empty_cache(self, batch: int, length: int, dtype: DTypeLike) -> LatentCache:
    """Returns an empty cache of `length` slots; a token's slot is its position."""
    return empty_latent_cache(self, batch, length, dtype)

  def cache_axes(self) -> LatentCache:
    """Returns the logical axes of the cache."""
    return LATENT_CACHE_AXES


class MLAttention(LatentAttention):
  """[B, T, D] -> [B, T, D], over a cache of one latent and one rotated key a token."""

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context, cache: Cache | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Mixes `x` [B, T, D]; see `AttentionConfig.build`."""
    query = self.queries(x, context)
    key = self.latents(x, context)
    positions, segments = context.positions, context.segments
    if cache is None:
      mask = visible(positions, positions, segments, segments)
    else:
      slots = jnp.where(context.real, positions, cache.positions.shape[1])
      cache = cache.write(slots, *key, positions)
      key = (cache.latent, cache.rope_key)
      mask = visible(positions, cache.positions)
    heads = self.mix(query, key, mask, context, causal=cache is None)
    return self.project(heads, x.shape[-1]), cache
