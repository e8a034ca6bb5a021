"""Attention whose key is its value and serves all heads: a window of it, and what kinds share."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.layers.attention import ring
from deepseek_jax.layers.attention.interface import Cache, in_order_only
from deepseek_jax.layers.attention.rope import RoPE
from deepseek_jax.layers.attention.spread import Whole, with_all_keys
from deepseek_jax.layers.attention.stored import Stored
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.context_parallel import Order
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.weights import vector, weight
from deepseek_jax.ops.attention.compressed import Keys, attend_compressed
from deepseek_jax.ops.attention.neighbours import with_tokens_before
from deepseek_jax.ops.attention.ring import Facts
from deepseek_jax.ops.linear import linear
from deepseek_jax.ops.norm import rms_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
  """Sizes of attention over one shared key a token; kinds that derive from it have these weights.

  Attributes:
    heads: query heads H.
    head_dim: channels C of a query and of the one key, which is the value too.
    rope_dim: last channels of both that are rotated.
    query_latent: channels of the query latent.
    groups: groups of neighbouring heads that are projected together.
    group_dim: channels of a group's projection.
    window: tokens that are seen as they are, the query's own among them.
    rope: rotary embedding.
    norm: norm of the latent, the key and, without a scale, of each head's query.
    stored: number formats that a cache would hold, which keys are rounded to, or None.

  Source: DeepSeek-V4, arXiv 2606.19348, section 2.3.
  """

  heads: int
  head_dim: int = 512
  rope_dim: int = 64
  query_latent: int = 1024
  groups: int = 8
  group_dim: int = 1024
  window: int = 128
  rope: RoPE = RoPE()
  norm: RMSNorm = RMSNorm()
  stored: Stored | None = None

  def __post_init__(self):
    sizes = [field.name for field in dataclasses.fields(self) if field.type is int]
    errors = wrong_sizes(self, tuple(sizes))
    if self.rope_dim % 2 or self.rope_dim > self.head_dim:
      errors.append(
        f'`rope_dim` is {self.rope_dim}; expected an even part of `head_dim` {self.head_dim}'
      )
    if self.groups > 0 and self.heads % self.groups:
      errors.append(f'`groups` is {self.groups}; it does not divide `heads` {self.heads}')
    if self.stored is not None:
      faults = self.stored.check(self.head_dim - self.rope_dim)
      errors += [f'stored: {message}' for message in faults]
    if errors:
      raise ConfigError(errors)

  def window_tokens(self, length: int) -> float:
    """Mean number of tokens in the window of a token of a `length`-token segment."""
    return float(np.mean(np.minimum(np.arange(1, length + 1), self.window)))

  def mixing_flops(self, length: int) -> float:
    """Forward FLOPs a token of scores and values over `length` causal tokens, on average."""
    return 4 * self.heads * self.head_dim * self.window_tokens(length)

  def check_shared(self, tokens: int, order: Order) -> list[str]:
    """Returns what is wrong with such an order of the tokens of a row, as messages."""
    del tokens
    return in_order_only(order, 'the tokens before its own')

  def empty_recent(self, batch: int, length: int, dtype: DTypeLike, spare: int) -> jax.Array:
    """Returns the ring [B, W + spare, C] of the last tokens' rotated keys, holding nothing."""
    return jnp.zeros((batch, min(self.window, length) + spare, self.head_dim), dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedWindow(Shared):
  """Sliding-window attention over one shared key a token, with a learned sink in each head.

  Source: DeepSeek-V4, arXiv 2606.19348, section 2.3.3.
  """

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return SharedWindowAttention(self, name=name)

  def empty_cache(self, batch: int, length: int, dtype: DTypeLike, spare: int = 0) -> jax.Array:
    """Returns an empty cache of the last `window` tokens."""
    return self.empty_recent(batch, length, dtype, spare)

  def cache_axes(self) -> tuple[str | None, ...]:
    """Returns the logical axes of the cache."""
    return RECENT_AXES


RECENT_AXES = ('batch', None, None)


def one_sequence(context: Context) -> Context:
  """Forgets packing, as every row with a cache does: its real tokens are of segment 1."""
  return dataclasses.replace(context, segments=context.real.astype(jnp.int32))


def round_rest(rows: jax.Array, config: Shared) -> jax.Array:
  """Rounds the channels of keys [..., C] that are not rotated, as `config.stored` has it."""
  if config.stored is None:
    return rows
  rest = rows.shape[-1] - config.rope_dim
  rounded = config.stored.round_key(rows[..., :rest])
  return jnp.concatenate([rounded, rows[..., rest:]], axis=-1)


def own_axes(tokens: Keys, context: Context) -> tuple[str, ...]:
  """Returns the mesh axes that share `tokens`; none where a cache has put others before them."""
  return context.sequence_axes if tokens.rows.shape[1] == context.tokens.shape[1] else ()


def with_window(tokens: Keys, window: int, axes: tuple[str, ...]) -> Keys:
  """Puts what a window reaches before a device's own tokens; `window` counts the query's own."""
  if not axes:
    return tokens
  facts = Facts(tokens.positions, tokens.segments)
  rows, facts = with_tokens_before(tokens.rows, facts, window - 1, axes)
  return Keys(rows, *facts)


class SharedAttention(nn.Module):
  """Projections of attention over one shared key a token; kinds say what else is seen."""

  config: Shared

  def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotates the last channels of `x` [B, T, …, C] to `positions` [B, T]."""
    rest = x.shape[-1] - self.config.rope_dim
    turned = self.config.rope.rotate(x[..., rest:], positions)
    return jnp.concatenate([x[..., :rest], turned], axis=-1)

  def queries(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
    """Returns the query latent [B, T, Q], normalised, and rotated queries [B, T, H, C]."""
    c, width = self.config, x.shape[-1]
    down = weight(self, 'query_down', (width, c.query_latent), ('embed', None), dtype=x.dtype)
    latent = c.norm.build('query_norm')(linear(x, down))
    shape = (c.query_latent, c.heads, c.head_dim)
    up = weight(self, 'query_up', shape, ('latent', 'heads', None), dtype=x.dtype)
    query = jnp.einsum('btq,qhc->bthc', latent, up)
    query = rms_norm(query, jnp.ones(c.head_dim), c.norm.epsilon)
    query = context.rules.constrain(query, ('batch', 'seq', 'act_heads', None))
    return latent, self.rotate(query, context.positions)

  def keys(self, x: jax.Array, context: Context) -> jax.Array:
    """Returns the normalised, rotated key of each token [B, T, C]."""
    shape = (x.shape[-1], self.config.head_dim)
    w = weight(self, 'key', shape, ('embed', None), dtype=x.dtype)
    key = self.config.norm.build('key_norm')(linear(x, w))
    return round_rest(self.rotate(key, context.positions), self.config)

  def recall(
    self, key: jax.Array, context: Context, recent: jax.Array | None
  ) -> tuple[Keys, jax.Array | None]:
    """Returns the tokens [B, P + T, C] that windows look into, and the memory after them."""
    if recent is None:
      return Keys(key, context.positions, context.segments), None
    old, places = ring.before(recent, context.positions, min(self.config.window, recent.shape[1]))
    own = jnp.where(context.real, context.positions, -1)
    positions = jnp.concatenate([jnp.maximum(places, -1), own], axis=1)
    rows = jnp.concatenate([old.astype(key.dtype), key], axis=1)
    after = ring.write(recent, key, context.positions, context.real)
    return Keys(rows, positions, jnp.where(positions < 0, 0, 1)), after

  def attend(
    self, query: jax.Array, context: Context, tokens: Keys, entries: Keys | None = None
  ) -> jax.Array:
    """Mixes the window and all entries before it.

    Args:
      query: [B, T, H, C].
      context: facts about the T tokens.
      tokens: from `recall`.
      entries: what stands for older tokens, or None.

    Returns:
      [B, T, H, C], turned back to position 0.
    """
    window, axes = self.config.window, own_axes(tokens, context)

    def mix(own, entries, whole):
      query, positions, segments, tokens = own
      tokens = with_window(tokens, window, axes)
      facts = query, positions, segments
      return attend_compressed(*facts, tokens, entries, window=window, sinks=whole.weights)

    own = query, context.positions, context.segments, tokens
    heads = with_all_keys(mix, own, entries, Whole(self.sinks()), context, axes)
    return self.turn_back(heads, context)

  def sinks(self) -> jax.Array:
    """Returns the logit of each head without a value, [H] float32."""
    heads = self.config.heads
    return vector(self, 'sinks', np.zeros(heads, np.float32), ('heads',))

  def turn_back(self, heads: jax.Array, context: Context) -> jax.Array:
    """Turns mixed values [B, T, H, C] back to position 0.

    A value is a rotated key: turned back by the query's position, it carries the distance alone.
    """
    heads = context.rules.constrain(heads, ('batch', 'seq', 'act_heads', None))
    return self.rotate(heads, -context.positions)

  def project(self, heads: jax.Array, width: int) -> jax.Array:
    """Brings head outputs [B, T, H, C] back to [B, T, D], group by group."""
    c = self.config
    shape = (c.heads, c.head_dim, c.group_dim)
    # A group's matrix maps its own heads alone: its fan-in is that of the whole over the groups.
    down = weight(
      self,
      'output_down',
      shape,
      ('heads', None, 'latent'),
      dtype=heads.dtype,
      inputs=2,
      gain=c.groups**0.5,
    )
    down = down.reshape(c.groups, c.heads // c.groups, c.head_dim, c.group_dim)
    grouped = heads.reshape(*heads.shape[:2], c.groups, c.heads // c.groups, c.head_dim)
    latent = jnp.einsum('btghc,ghco->btgo', grouped, down)
    up = weight(
      self, 'output_up', (c.groups * c.group_dim, width), (None, 'embed'), dtype=heads.dtype
    )
    return latent.reshape(*latent.shape[:2], -1) @ up


class SharedWindowAttention(SharedAttention):
  """[B, T, D] -> [B, T, D], over a cache of the last tokens."""

  config: SharedWindow

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context, cache: Cache | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Mixes `x` [B, T, D]; see `AttentionConfig.build`."""
    context = context if cache is None else one_sequence(context)
    _, query = self.queries(x, context)
    tokens, cache = self.recall(self.keys(x, context), context, cache)
    heads = self.attend(query, context, tokens)
    return self.project(heads, x.shape[-1]), cache
