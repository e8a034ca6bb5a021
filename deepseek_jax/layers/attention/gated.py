"""Attention that a learned gate thins out."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.interface import Cache
from deepseek_jax.layers.attention.latent import (
  LATENT_CACHE_AXES,
  Latent,
  LatentAttention,
  LatentCache,
  empty_latent_cache,
)
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.weights import weight
from deepseek_jax.ops.attention.reference import keep_highest, kept_counts, visible

LATER_WINS = 2.0**-16
"""Rank that a token gains over the one before it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gated(Latent):
  """Latent attention to the share of the visible past that a learned gate keeps.

  A gate scores every token once, from its own activation. A query keeps the `keep` share of its
  visible tokens with the highest scores, and itself. The log of the gate's sigmoid is added to the
  attention scores, so that the loss teaches the gate. This is the dense reference: every score is
  computed, what is not kept is masked.

  Attributes:
    keep: share of the visible tokens that each query keeps, in (0, 1].
  """

  keep: float = 0.3

  def __post_init__(self):
    super().__post_init__()
    if not 0.0 < self.keep <= 1.0:
      raise ConfigError(f'`keep` is {self.keep}; expected a share above 0 and at most 1')

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return GatedAttention(self, name=name)

  def visible_tokens(self, length: int) -> float:
    """Mean number of tokens that a token of a `length`-token segment attends to.

    The gate's favourites, and the token itself where it is not among them; every token is as
    likely to be as any other.
    """
    visible, kept = np.arange(1, length + 1), kept_counts(self.keep, length)[1:]
    return float(np.mean(kept + 1 - kept / visible))

  def empty_cache(self, batch: int, length: int, dtype: DTypeLike) -> 'GatedCache':
    """Returns an empty cache of `length` slots; a token's slot is its position."""
    kept = empty_latent_cache(self, batch, length, dtype)
    return GatedCache(tokens=kept, gate=jnp.zeros((batch, length), jnp.float32))

  def cache_axes(self) -> 'GatedCache':
    """Returns the logical axes of the cache."""
    return GatedCache(tokens=LATENT_CACHE_AXES, gate=('batch', 'cache_length'))  # type: ignore[arg-type]


@struct.dataclass
class GatedCache:
  """Latent cache, and the gate's score of each token [B, S] float32."""

  tokens: LatentCache
  gate: jax.Array


class GatedAttention(LatentAttention):
  """[B, T, D] -> [B, T, D]; the gate is causal, since a token's score is its own."""

  config: Gated

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context, cache: Cache | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Mixes `x` [B, T, D]; see `AttentionConfig.build`."""
    query = self.queries(x, context)
    key = self.latents(x, context)
    # float32: the scores are ranked, and rounding makes ties.
    w = weight(self, 'gate', (x.shape[-1], 1), ('embed', None), dtype=jnp.float32)
    gate = jnp.einsum('btd,dk->btk', x.astype(jnp.float32), w)[..., 0]
    positions, segments = context.positions, context.segments
    if cache is None:
      key_positions = positions
      mask = visible(positions, positions, segments, segments)
    else:
      slots = jnp.where(context.real, positions, cache.gate.shape[1])
      tokens = cache.tokens.write(slots, *key, positions)
      rows = jnp.arange(slots.shape[0])[:, None]
      gate = cache.gate.at[rows, slots].set(gate, mode='drop')
      cache = GatedCache(tokens=tokens, gate=gate)
      key, key_positions = (tokens.latent, tokens.rope_key), tokens.positions
      mask = visible(positions, key_positions)
    itself = key_positions[:, None, :] == positions[:, :, None]
    # Equal tokens have equal scores in the first layer. The later one wins, by a margin well above
    # rounding, so that the choice is the same in every batch shape.
    ranked = jax.lax.stop_gradient(gate) + key_positions * LATER_WINS
    kept = keep_highest(ranked, mask, self.config.keep) | (mask & itself)
    bias = jnp.broadcast_to(jax.nn.log_sigmoid(gate)[:, None, :], kept.shape)
    return self.project(self.mix(query, key, kept, context, bias), x.shape[-1]), cache
