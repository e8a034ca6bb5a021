"""Attention in both directions, for encoders."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.layers.attention.interface import Cache
from deepseek_jax.layers.attention.mha import HeadAttention
from deepseek_jax.layers.attention.rope import Axial
from deepseek_jax.layers.bias import Bias, add_bias
from deepseek_jax.layers.context import Context
from deepseek_jax.ops.attention.reference import Seen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bidirectional:
  """Multi-head attention in which every token sees all tokens of its segment, later ones too.

  Without `rope` it knows no order: positions are the business of what makes the tokens. It has no
  cache, since a token that is added would change all others.

  Attributes:
    heads: heads H.
    head_dim: channels of a query, key or value head.
    rope: rotary embedding of the places that the context's coordinates give, or None.
    bias: offsets beside all four matrices, or None.

  Source: Vaswani et al., arXiv 1706.03762, section 3.2.2.
  """

  heads: int
  head_dim: int = 64
  rope: Axial | None = None
  bias: Bias | None = None

  def __post_init__(self):
    errors = wrong_sizes(self, ('heads', 'head_dim'))
    if self.rope is not None and self.head_dim % 2:
      errors.append(f'`head_dim` is {self.head_dim}; rotary pairs need an even number')
    if errors:
      raise ConfigError(errors)

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return BidirectionalAttention(self, name=name)

  def mixing_flops(self, length: int) -> float:
    """Forward FLOPs a token of scores and values over all `length` tokens."""
    return 4 * self.heads * self.head_dim * length

  def empty_cache(self, batch: int, length: int, dtype: DTypeLike, spare: int = 0) -> Cache:
    """Refuses: see the class.

    Raises:
      ConfigError: always.
    """
    del batch, length, dtype, spare
    raise ConfigError(_NO_CACHE)

  def cache_axes(self) -> Cache:
    """Refuses: see the class.

    Raises:
      ConfigError: always.
    """
    raise ConfigError(_NO_CACHE)


_NO_CACHE = 'Bidirectional attention sees later tokens too: it has no cache and cannot generate'


class BidirectionalAttention(HeadAttention):
  """[B, T, D] -> [B, T, D], by the segments of the context alone."""

  config: Bidirectional

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context, cache: Cache | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Mixes `x` [B, T, D]; see `AttentionConfig.build`."""
    if cache is not None:
      raise ConfigError(_NO_CACHE)
    c, axes = self.config, ('heads', None)
    query, key, value = (
      add_bias(
        c.bias, self, f'{name}_bias', self.heads(x, name, c.heads, c.head_dim, context), axes
      )
      for name in ('query', 'key', 'value')
    )
    if c.rope is not None:
      if context.coordinates is None:
        raise ConfigError(
          'Bidirectional.rope needs `context.coordinates`, which is None: an encoder of a grid or '
          'of points gives them'
        )
      query, key = (c.rope.rotate(part, context.coordinates) for part in (query, key))
    # Where all positions are 0, no token comes after another.
    nowhere, segments = jnp.zeros_like(context.segments), context.segments
    seen = Seen(nowhere, nowhere, segments, segments)
    mixed = self.attend(query, key, value, seen, context)
    y = self.project(mixed, x.shape[-1], context)
    return add_bias(c.bias, self, 'output_bias', y, (None,)), None
