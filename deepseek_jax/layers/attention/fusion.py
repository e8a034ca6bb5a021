"""Cross-attention to several modalities, weighed by how well each fits the question."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.layers.attention.cross import OrderedCross
from deepseek_jax.layers.attention.interface import Cache
from deepseek_jax.layers.attention.mha import (
  HEAD_CACHE_AXES,
  HeadAttention,
  HeadCache,
  empty_head_cache,
)
from deepseek_jax.layers.context import MODALITIES, TEXT, Context
from deepseek_jax.layers.weights import observe, weight
from deepseek_jax.ops.attention.reference import visible
from deepseek_jax.ops.fusion import attend_fused, modality_weights
from deepseek_jax.ops.running import segment_sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fusion(OrderedCross):
  """Attention to each modality by itself; the results are summed by dynamic weights.

  The weights are attention too: the mean of the words so far asks, the mean of what each modality
  shows answers, and the softmax is over the modalities that are there. One modality alone so counts
  in full, and one that is missing takes part in nothing.

  Attributes:
    heads: heads H.
    head_dim: channels of a query, key or value head.
    slots: longest memory that a cache holds, in vectors.
    weight_dim: channels that question and modality are compared in.
  """

  weight_dim: int = 64

  def __post_init__(self):
    super().__post_init__()
    errors = wrong_sizes(self, ('weight_dim',))
    if errors:
      raise ConfigError(errors)

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return FusionAttention(self, name=name)

  # What a cache holds is more than the keys and values of its base.
  def empty_cache(  # type: ignore[override]
    self, batch: int, length: int, dtype: DTypeLike, spare: int = 0
  ) -> 'FusionCache':
    """Returns an empty cache of `slots` vectors and one running sum.

    Raises:
      ConfigError: `spare` is not 0.
    """
    del length
    if spare:
      raise ConfigError('Fusion cannot take tokens back: it keeps a running mean of the text')
    heads = empty_head_cache(batch, self.slots, self.heads, self.head_dim, dtype)
    answers = jnp.zeros((batch, self.slots, self.weight_dim), jnp.float32)
    modality = jnp.zeros((batch, self.slots), jnp.int32)
    total = jnp.zeros((batch, self.weight_dim + 1), jnp.float32)
    return FusionCache(heads, answers, modality, total)

  def cache_axes(self) -> 'FusionCache':  # type: ignore[override]
    """Returns the logical axes of the cache."""
    return FusionCache(
      heads=HEAD_CACHE_AXES,
      answers=('batch', 'cache_length', None),  # type: ignore[arg-type]
      modality=('batch', 'cache_length'),  # type: ignore[arg-type]
      total=('batch', None),  # type: ignore[arg-type]
    )


@struct.dataclass
class FusionCache:
  """The memory as it is attended to, and the text so far.

  Attributes:
    heads: keys and values [B, S, H, K], and positions.
    answers: [B, S, W] float32 what the weights are made with.
    modality: [B, S] int32.
    total: [B, W + 1] float32 sum of the projected text tokens so far, and how many they are.
  """

  heads: HeadCache
  answers: jax.Array
  modality: jax.Array
  total: jax.Array


class FusionAttention(HeadAttention):
  """[B, T, D] -> [B, T, D]; reports `fusion`: sums over real text tokens of each weight."""

  config: Fusion

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context, cache: Cache | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Mixes `x` [B, T, D]; see `AttentionConfig.build`.

    Raises:
      ConfigError: there is no memory that says which modality it is of, or too much of it.
    """
    c, memory = self.config, context.memory
    query = self.heads(x, 'query', c.heads, c.head_dim, context)
    asked, total = self.question(x, context, cache)
    if memory is None:
      if cache is None:
        raise ConfigError('Fusion attends to `context.memory`, which is None')
      heads, answers, modality = cache.heads, cache.answers, cache.modality
      mask = visible(context.positions, heads.positions)
    else:
      if memory.modality is None:
        raise ConfigError('Fusion weighs modalities, but `context.memory.modality` is None')
      values, modality = memory.values.astype(x.dtype), memory.modality
      places = jnp.where(memory.segments > 0, memory.positions, -1)
      heads = HeadCache(
        self.heads(values, 'key', c.heads, c.head_dim, context),
        self.heads(values, 'value', c.heads, c.head_dim, context),
        places,
      )
      answers = self.answer(values)
      mask = visible(context.positions, places, context.segments, memory.segments)
    weights = modality_weights(asked, answers, mask, modality, len(MODALITIES))
    words = self.words(context)
    observe(
      self,
      'fusion',
      {'weights': jnp.einsum('btm,bt->m', weights, words), 'tokens': jnp.sum(words)},
    )
    key, value = heads.key.astype(x.dtype), heads.value.astype(x.dtype)
    mixed = attend_fused(query, key, value, mask, modality, weights)
    if cache is not None:
      if memory is not None:
        cache = self.remember(cache, heads, answers, modality)
      cache = cache.replace(total=total)
    return self.project(mixed, x.shape[-1], context), cache

  def words(self, context: Context) -> jax.Array:
    """Returns which tokens are text, [B, T] float32."""
    text = context.real
    if context.modality is not None:
      text &= context.modality == TEXT
    return text.astype(jnp.float32)

  def question(
    self, x: jax.Array, context: Context, cache: Cache | None
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the mean [B, T, W] of the projected text up to each token, and the last sum."""
    shape = (x.shape[-1], self.config.weight_dim)
    w = weight(self, 'ask', shape, ('embed', None), dtype=jnp.float32)
    words = self.words(context)[..., None]
    asked = jnp.einsum('btd,dw->btw', x.astype(jnp.float32), w)
    sums = segment_sums(
      jnp.concatenate([asked, jnp.ones_like(words)], -1) * words, context.segments
    )
    if cache is not None:
      # A row in a cache is one document; padding after it has added nothing.
      sums = jnp.where(context.real[..., None], sums + cache.total[:, None], 0.0)
      last = jnp.argmax(jnp.where(context.real, jnp.arange(x.shape[1]), -1), axis=1)
      newest = jnp.take_along_axis(sums, last[:, None, None], axis=1)[:, 0]
      total = jnp.where(jnp.any(context.real, axis=1)[:, None], newest, cache.total)
    else:
      total = sums[:, -1]
    return sums[..., :-1] / jnp.maximum(sums[..., -1:], 1.0), total

  def answer(self, values: jax.Array) -> jax.Array:
    """Returns what the weights compare the question with, [B, S, W] float32, of [B, S, D]."""
    shape = (values.shape[-1], self.config.weight_dim)
    w = weight(self, 'answer', shape, ('embed', None), dtype=jnp.float32)
    return jnp.einsum('bsd,dw->bsw', values.astype(jnp.float32), w)

  def remember(
    self, cache: Cache, heads: HeadCache, answers: jax.Array, modality: jax.Array
  ) -> Cache:
    """Puts a memory [B, S, …] in place of what the cache held."""
    count, room = answers.shape[1], cache.answers.shape[1]
    if count > room:
      raise ConfigError(
        f'a memory of {count} vectors does not fit into {room} `slots` of the cache'
      )

    def pad(new, old, fill=0):
      widths = [(0, 0), (0, room - count)] + [(0, 0)] * (new.ndim - 2)
      return jnp.pad(new, widths, constant_values=fill).astype(old.dtype)

    old = cache.heads
    held = HeadCache(
      pad(heads.key, old.key),
      pad(heads.value, old.value),
      pad(heads.positions, old.positions, -1),
    )
    return FusionCache(
      held, pad(answers, cache.answers), pad(modality, cache.modality), cache.total
    )
