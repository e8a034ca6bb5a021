"""Heavily compressed attention: a window, and one entry for every hundred tokens before."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from deepseek_jax.layers.attention.compressor import (
  COMPRESSED_AXES,
  Compressed,
  Compressor,
  empty_compressed,
)
from deepseek_jax.layers.attention.interface import Cache
from deepseek_jax.layers.attention.rope import RoPE, YaRN
from deepseek_jax.layers.attention.shared_window import (
  RECENT_AXES,
  Shared,
  SharedAttention,
  one_sequence,
)
from deepseek_jax.layers.context import Context

COMPRESSED_ROPE = RoPE(theta=160_000.0, yarn=YaRN(factor=16.0, original_length=65_536))
"""Rotary embedding of the released layers that compress, their windows and indexers among them."""


def seen_entries(length: int, ratio: int) -> np.ndarray:
  """Returns how many entries each token of a segment may see, [length] int64."""
  return np.arange(1, length + 1) // ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class HCA(Shared):
  """Attention to a window of tokens and to one entry for each whole block of `ratio` tokens.

  Attributes:
    ratio: tokens r of a block.

  Source: DeepSeek-V4, arXiv 2606.19348, section 2.3.2.
  """

  ratio: int = 128
  rope: RoPE = COMPRESSED_ROPE

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return HCAttention(self, name=name)

  def mixing_flops(self, length: int) -> float:
    """Forward FLOPs a token of scores and values over `length` causal tokens, on average."""
    entries = float(np.mean(seen_entries(length, self.ratio)))
    return super().mixing_flops(length) + 4 * self.heads * self.head_dim * entries

  def empty_cache(self, batch: int, length: int, dtype: DTypeLike, spare: int = 0) -> 'HCACache':
    """Returns an empty cache: the window, and an entry for every `ratio` of `length` tokens."""
    past = empty_compressed(batch, length, self.head_dim, self.ratio, 1, dtype, spare)
    return HCACache(recent=self.empty_recent(batch, length, dtype, spare), past=past)

  def cache_axes(self) -> 'HCACache':
    """Returns the logical axes of the cache."""
    return HCACache(recent=RECENT_AXES, past=COMPRESSED_AXES)  # type: ignore[arg-type]


@struct.dataclass
class HCACache:
  """The last tokens [B, W, C], and the entries [B, N, C] of all."""

  recent: jax.Array
  past: Compressed


class HCAttention(SharedAttention):
  """[B, T, D] -> [B, T, D], over a cache that grows by an entry every `ratio` tokens."""

  config: HCA

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context, cache: Cache | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Mixes `x` [B, T, D]; see `AttentionConfig.build`."""
    c = self.config
    context = context if cache is None else one_sequence(context)
    old = (None, None) if cache is None else (cache.recent, cache.past)
    _, query = self.queries(x, context)
    tokens, recent = self.recall(self.keys(x, context), context, old[0])
    with jax.named_scope('compress'):
      compressor = Compressor(
        c.head_dim, c.ratio, 1, c.rope_dim, c.rope, c.norm, c.stored, name='compressor'
      )
      entries, past = compressor(x, context, old[1])
    heads = self.attend(query, context, tokens, entries)
    after = None if recent is None or past is None else HCACache(recent=recent, past=past)
    return self.project(heads, x.shape[-1]), after
