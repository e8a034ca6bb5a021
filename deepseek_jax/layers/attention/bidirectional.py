"""Attention in both directions, for encoders."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.interface import Cache
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.weights import weight
from deepseek_jax.ops.attention.reference import attend


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bidirectional:
  """Multi-head attention in which every token sees all tokens of its segment, later ones too.

  It knows no order: positions are the business of what makes the tokens. It has no cache, since a
  token that is added would change all others.

  Attributes:
    heads: heads H.
    head_dim: channels of a query, key or value head.

  Source: Vaswani et al., arXiv 1706.03762, section 3.2.2.
  """

  heads: int
  head_dim: int = 64

  def __post_init__(self):
    errors = [
      f'`{name}` is {size}; expected 1 or more'
      for name in ('heads', 'head_dim')
      if (size := getattr(self, name)) < 1
    ]
    if errors:
      raise ConfigError(errors)

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return BidirectionalAttention(self, name=name)

  def mixing_flops(self, length: int) -> float:
    """Forward FLOPs a token of scores and values over all `length` tokens."""
    return 4 * self.heads * self.head_dim * length

  def empty_cache(self, batch: int, length: int, dtype: DTypeLike) -> Cache:
    """Refuses: see the class.

    Raises:
      ConfigError: always.
    """
    raise ConfigError(_NO_CACHE)

  def cache_axes(self) -> Cache:
    """Refuses: see the class.

    Raises:
      ConfigError: always.
    """
    raise ConfigError(_NO_CACHE)


_NO_CACHE = 'Bidirectional attention sees later tokens too: it has no cache and cannot generate'


class BidirectionalAttention(nn.Module):
  """[B, T, D] -> [B, T, D], by the segments of the context alone."""

  config: Bidirectional

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context, cache: Cache | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Mixes `x` [B, T, D]; see `AttentionConfig.build`."""
    if cache is not None:
      raise ConfigError(_NO_CACHE)
    c, width = self.config, x.shape[-1]
    shape, axes = (width, c.heads, c.head_dim), ('embed', 'heads', None)

    def heads(name: str) -> jax.Array:
      y = jnp.einsum('btd,dhk->bthk', x, weight(self, name, shape, axes, dtype=x.dtype))
      return context.rules.constrain(y, ('batch', 'seq', 'act_heads', None))

    segments = context.segments
    mask = segments[:, :, None] == segments[:, None, :]
    query, key, value = heads('query'), heads('key'), heads('value')
    mixed = attend(query, key, value, mask, scale=c.head_dim**-0.5)
    mixed = context.rules.constrain(mixed, ('batch', 'seq', 'act_heads', None))
    output = weight(
      self,
      'output',
      (c.heads, c.head_dim, width),
      ('heads', None, 'embed'),
      dtype=x.dtype,
      inputs=2,
    )
    return jnp.einsum('bthk,hkd->btd', mixed, output), None
