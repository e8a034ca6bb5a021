"""Latent projections that the attention kinds of this family share, and MLA itself."""

import dataclasses
import functools
from typing import Any, NamedTuple

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
from deepseek_jax.layers.attention.stored import Stored
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.context_parallel import Order
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.weights import weight
from deepseek_jax.ops.attention.reference import Seen, attend, attend_latent, visible, window_mask
from deepseek_jax.ops.attention.ring import Keys
from deepseek_jax.ops.linear import linear

FEW = 2
"""Queries whose scores of all keys are held at once. On two CPU cores a loop over blocks of 2,048
keys takes 2.1, 1.7 and 0.9 times as long for one, two and four queries in each of 8 rows."""


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
    stored: number formats that a cache would hold, which latents are rounded to, or None.
  """

  heads: int
  nope_dim: int = 128
  rope_dim: int = 64
  value_dim: int = 128
  latent: int = 512
  query_latent: int | None = None
  rope: RoPE = RoPE()
  norm: RMSNorm = RMSNorm()
  stored: Stored | None = None

  def __post_init__(self):
    sizes = ('heads', 'nope_dim', 'rope_dim', 'value_dim', 'latent', 'query_latent')
    errors = wrong_sizes(self, sizes)
    if self.rope_dim % 2:
      errors.append(f'`rope_dim` is {self.rope_dim}; rotary pairs need an even number')
    if self.stored is not None:
      errors += [f'stored: {message}' for message in self.stored.check(self.latent)]
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


class Queries(NamedTuple):
  """Queries that are not made yet: all of them together are larger than what they are made of.

  Attributes:
    source: [B, T, C] what `LatentAttention.query_source` returns.
    matrix: [C, H, nope + R].
    positions: [B, T] int32.
  """

  source: jax.Array
  matrix: jax.Array
  positions: jax.Array

  def make(self, config: Latent) -> tuple[jax.Array, jax.Array]:
    """Returns queries without position [B, T, H, nope] and rotated ones [B, T, H, R]."""
    q = jnp.einsum('btd,dhk->bthk', self.source, self.matrix)
    nope, rope = q[..., : config.nope_dim], q[..., config.nope_dim :]
    return nope, config.rope.rotate(rope, self.positions)

  def rows(self, rows: Any) -> 'Queries':
    """Keeps some of the T queries; a slice, or [n] int32."""
    return self._replace(source=self.source[:, rows], positions=self.positions[:, rows])


class LatentAttention(nn.Module):
  """Projections of latent attention; kinds derive from it and say who sees whom.

  Source: DeepSeek-V2, arXiv 2405.04434, section 2.1, equations 37 to 47.
  """

  config: Latent

  def queries(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
    """Returns queries without position [B, T, H, nope] and rotated ones [B, T, H, R]."""
    return self.queries_of(self.query_source(x), context)

  def unmade_queries(self, x: jax.Array, context: Context) -> Queries:
    """Returns what the queries of `x` [B, T, D] are made of, for a kind that makes them later."""
    source = self.query_source(x)
    return Queries(source, self.query_matrix(source), context.positions)

  def query_source(self, x: jax.Array) -> jax.Array:
    """Returns what queries are made of: the normalised query latent [B, T, C], or `x` itself."""
    c = self.config
    if c.query_latent is None:
      return x
    shape = (x.shape[-1], c.query_latent)
    down = weight(self, 'query_down', shape, ('embed', None), dtype=x.dtype)
    return c.norm.build('query_norm')(linear(x, down))

  def queries_of(self, source: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
    """Returns the pair of `queries`, made of what `query_source` returns, [B, T, C]."""
    found = Queries(source, self.query_matrix(source), context.positions).make(self.config)
    layout = ('batch', 'seq', 'act_heads', None)
    return context.rules.constrain(found[0], layout), context.rules.constrain(found[1], layout)

  def query_matrix(self, source: jax.Array) -> jax.Array:
    """Declares what makes queries of `source` [B, T, C]: [C, H, nope + R]."""
    c = self.config
    name, axis = ('query', 'embed') if c.query_latent is None else ('query_up', 'latent')
    shape = (source.shape[-1], c.heads, c.nope_dim + c.rope_dim)
    return weight(self, name, shape, (axis, 'heads', None), dtype=source.dtype)

  def latents(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
    """Returns the normalised latent [B, T, C] and the rotated shared key [B, T, R]."""
    c, width = self.config, x.shape[-1]
    shape = (width, c.latent + c.rope_dim)
    down = weight(self, 'latent_down', shape, ('embed', None), dtype=x.dtype)
    both = linear(x, down)
    latent = c.norm.build('latent_norm')(both[..., : c.latent])
    if c.stored is not None:
      latent = c.stored.round_key(latent)
    # The rotated key is not normalised: its length is what the model learns position by.
    return latent, c.rope.rotate(both[..., c.latent :], context.positions)

  def mix(
    self, query, key, mask: jax.Array, context: Context, bias: jax.Array | None = None
  ) -> jax.Array:
    """Attends from T queries to S tokens by a mask that says who sees whom.

    Expanded (keys and values of every head are made) or absorbed (queries go to the latent
    space), whichever costs fewer FLOPs: a static choice by T and S.

    Args:
      query: the pair that `queries` returns.
      key: the pair that `latents` returns, or what a cache remembers of it.
      mask: [B, T, S] bool.
      context: facts about the T tokens.
      bias: [B, T, S] float32 added to the scores of every head, or None.

    Returns:
      [B, T, H, V] outputs of the heads, for `project`.
    """
    c = self.config
    if not absorbing_is_cheaper(c, *mask.shape[1:]):
      whole_query, whole_key, value = self.expand(query, key)
      heads = attend(whole_query, whole_key, value, mask, scale=c.softmax_scale, bias=bias)
    else:
      (_, query_rope), (latent, rope_key) = query, key
      query_latent, up_value = self.absorb(query[0])
      latent, rope_key = (x.astype(query_latent.dtype) for x in (latent, rope_key))
      mixed = attend_latent(
        query_latent, query_rope, latent, rope_key, mask, scale=c.softmax_scale, bias=bias
      )
      heads = jnp.einsum('bthc,chv->bthv', mixed, up_value)
    return context.rules.constrain(heads, ('batch', 'seq', 'act_heads', None))

  def mix_seen(
    self,
    query,
    key,
    seen: Seen,
    context: Context,
    window: tuple[int, int] | None = None,
  ) -> jax.Array:
    """Attends from T queries to S tokens, without a mask of all pairs in memory.

    Args:
      query: the pair that `queries` returns.
      key: the pair that `latents` returns, or what a cache remembers of it.
      seen: which tokens each query may see.
      context: facts about the T tokens.
      window: (size, n): only the last `size` positions are seen, and those below n.

    Returns:
      [B, T, H, V] outputs of the heads, for `project`.
    """
    c, tokens, keys = self.config, query[0].shape[1], key[0].shape[1]
    mix = functools.partial(
      attend_sharded,
      seen=seen,
      rules=context.rules,
      scale=c.softmax_scale,
      window=window,
    )
    if not absorbing_is_cheaper(c, tokens, keys):
      heads = mix(*self.expand(query, key))
    elif tokens <= FEW:
      mask = visible(*seen)
      if window is not None:
        mask &= window_mask(seen.query_positions, seen.key_positions, *window)
      return self.mix(query, key, mask, context)
    else:
      query_latent, up_value = self.absorb(query[0])
      rows = jnp.concatenate(key, axis=-1).astype(query_latent.dtype)[:, :, None]
      whole = jnp.concatenate([query_latent, query[1]], axis=-1)
      mixed = mix(whole, rows, rows[..., : c.latent])
      heads = jnp.einsum('bthc,chv->bthv', mixed, up_value)
    return context.rules.constrain(heads, ('batch', 'seq', 'act_heads', None))

  def mix_own(
    self, query, key, context: Context, window: tuple[int, int] | None = None
  ) -> jax.Array:
    """Attends from T tokens to those before them in their segments; see `mix_seen`.

    Where devices share the row, what travels is `key`: C + R channels a token, and not
    H (nope + R + V).
    """
    c, whole = self.config, jnp.concatenate(query, axis=-1)
    up = self.up(whole.dtype)
    made = functools.partial(expand_latents, c)
    facts: dict[str, Any] = {'scale': c.softmax_scale, 'window': window}
    heads = attend_spread(whole, Keys(key, up, made), context, **facts)
    if heads is None:
      seen, rules = context.own(), context.rules
      heads = attend_sharded(whole, *made(key, up), seen, rules, in_order=True, **facts)
    return context.rules.constrain(heads, ('batch', 'seq', 'act_heads', None))

  def absorb(self, query: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Brings queries [B, T, H, nope] to the latent space [B, T, H, C].

    Returns:
      Them, and what brings mixed latents to values [C, H, V].
    """
    up = self.up(query.dtype)
    up_key, up_value = up[..., : self.config.nope_dim], up[..., self.config.nope_dim :]
    return jnp.einsum('bthk,chk->bthc', query, up_key), up_value

  def up(self, dtype: DTypeLike) -> jax.Array:
    """Declares what brings a latent to the keys and values of all heads [C, H, nope + V]."""
    c = self.config
    shape = (c.latent, c.heads, c.nope_dim + c.value_dim)
    return weight(self, 'key_value_up', shape, ('latent', 'heads', None), dtype=dtype)

  def expand(self, query, key) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries and keys with both parts [B, T, H, nope + R], and values [B, S, H, V]."""
    whole_query = jnp.concatenate(query, axis=-1)
    return whole_query, *expand_latents(self.config, key, self.up(whole_query.dtype))

  def project(self, heads: jax.Array, width: int) -> jax.Array:
    """Brings head outputs [B, T, H, V] back to [B, T, D]."""
    return jnp.einsum('bthv,hvd->btd', heads, self.output_matrix(width, heads.dtype))

  def output_matrix(self, width: int, dtype: DTypeLike) -> jax.Array:
    """Declares what brings head outputs back to `width` channels [H, V, D]."""
    shape = (self.config.heads, self.config.value_dim, width)
    return weight(self, 'output', shape, ('heads', None, 'embed'), dtype=dtype, inputs=2)


def expand_latents(
  config: Latent, key: tuple[jax.Array, jax.Array], up: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Makes keys and values of every head: the fewest FLOPs a pair.

  Args:
    config: sizes.
    key: latents [B, S, C] and rotated keys [B, S, R].
    up: [C, H, nope + V].

  Returns:
    Keys [B, S, H, nope + R] and values [B, S, H, V].
  """
  latent, rope_key = (x.astype(up.dtype) for x in key)
  # One product for keys and values: it runs faster than two half as wide.
  both = jnp.einsum('bsc,chk->bshk', latent, up)
  nope, value = both[..., : config.nope_dim], both[..., config.nope_dim :]
  shared = jnp.broadcast_to(rope_key[:, :, None], (*nope.shape[:3], config.rope_dim))
  return jnp.concatenate([nope, shared], axis=-1), value


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


class MLAttention(LatentAttention):
  """[B, T, D] -> [B, T, D], over a cache of one latent and one rotated key a token."""

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context, cache: Cache | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Mixes `x` [B, T, D]; see `AttentionConfig.build`."""
    query = self.queries(x, context)
    key = self.latents(x, context)
    positions = context.positions
    if cache is None:
      heads = self.mix_own(query, key, context)
    else:
      cache = cache.write(context.slots(cache.positions.shape[1]), *key, positions)
      key = (cache.latent, cache.rope_key)
      heads = self.mix_seen(query, key, Seen(positions, cache.positions), context)
    return self.project(heads, x.shape[-1]), cache
