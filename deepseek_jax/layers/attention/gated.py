"""Attention that a learned gate thins out."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.chosen import Chosen, ChosenAttention
from deepseek_jax.layers.attention.interface import Cache, block_faults
from deepseek_jax.layers.attention.latent import (
  LATENT_CACHE_AXES,
  Latent,
  LatentCache,
  empty_latent_cache,
)
from deepseek_jax.layers.attention.spread import choose_spread
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.context_parallel import Order
from deepseek_jax.layers.weights import weight
from deepseek_jax.ops.attention import block_sets
from deepseek_jax.ops.attention.reference import Seen, kept_counts
from deepseek_jax.ops.attention.select import select_prefix

LATER_WINS = 2.0**-16
"""Rank that a token gains over the one before it."""
STAGES = 4
"""Parts a row is cut into, each with as many keys as its last block keeps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
  """Keeps a share of the past: attention still grows with the square of the length.

  Attributes:
    share: of the tokens before the window, in (0, 1].
  """

  share: float = 0.3

  def __post_init__(self):
    if not 0.0 < self.share <= 1.0:
      raise ConfigError(f'`share` is {self.share}; expected a share above 0 and at most 1')

  def counts(self, length: int) -> np.ndarray:
    """Returns how many of 0 … `length` tokens are kept, [length + 1] int32."""
    counts = kept_counts(self.share, length)
    counts[0] = 0
    return counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
  """Keeps a number of tokens that grows with the logarithm of the past: O(T log T) in all.

  Attributes:
    factor: tokens kept for every doubling of the past.
  """

  factor: float = 16.0

  def __post_init__(self):
    if not self.factor > 0:
      raise ConfigError(f'`factor` is {self.factor}; expected a number above 0')

  def counts(self, length: int) -> np.ndarray:
    """Returns how many of 0 … `length` tokens are kept, [length + 1] int32."""
    past = np.arange(length + 1)
    wanted = np.ceil(self.factor * np.log2(past + 1) * (1 - 1e-12))
    return np.minimum(wanted, past).astype(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftGate:
  """The log of the gate's sigmoid is added to the scores: what is kept is weighed by it too."""

  def bias(self, gate: jax.Array) -> jax.Array:
    """Returns what is added to the scores of each key, [B, S] float32."""
    return jax.nn.log_sigmoid(gate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StraightThrough:
  """A kept key counts in full; the gradient is that of a weight that is the gate's sigmoid.

  Source: Bengio et al., arXiv 1308.3432, section 4.
  """

  def bias(self, gate: jax.Array) -> jax.Array:
    """Returns zeros [B, S] float32 with the gradient of log(1 + σ - stop(σ))."""
    soft = jax.nn.sigmoid(gate)
    return soft - jax.lax.stop_gradient(soft)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gated(Latent):
  """Latent attention to the part of the past that a learned gate keeps, and to what is near.

  A gate scores every token once, from its own activation: O(T). Queries are taken in blocks. A
  block attends to itself, to the window before it, and to those tokens before the window that have
  the highest scores, as many as `keep` says. Time and memory are those of the tokens kept.

  Attributes:
    keep: how many tokens before the window are kept.
    block: queries that share their keys.
    window: tokens before a block that it sees in any case.
    gradient: what the gate learns from.
  """

  keep: Share | Log = Share()
  block: int = 64
  window: int = 64
  gradient: SoftGate | StraightThrough = SoftGate()

  def __post_init__(self):
    super().__post_init__()
    errors = []
    if self.block < 1:
      errors.append(f'`block` is {self.block}; expected 1 or more queries')
    if self.window < 0:
      errors.append(f'`window` is {self.window}; expected 0 or more tokens')
    if errors:
      raise ConfigError(errors)

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return GatedAttention(self, name=name)

  def visible_tokens(self, length: int) -> float:
    """Mean number of tokens that a token of a `length`-token segment attends to."""
    place = np.arange(length)
    past = np.maximum(place // self.block * self.block - self.window, 0)
    return float(np.mean(self.keep.counts(length)[past] + place + 1 - past))

  def check_shared(self, tokens: int, order: Order) -> list[str]:
    """Returns what is wrong with devices that have so many tokens of a row each, as messages."""
    return block_faults(self.block, tokens, order, 'block')

  def empty_cache(self, batch: int, length: int, dtype: DTypeLike, spare: int = 0) -> 'GatedCache':
    """Returns an empty cache of `length` slots; a token's slot is its position."""
    del spare  # See MLA.
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


class GatedAttention(ChosenAttention):
  """[B, T, D] -> [B, T, D]; the gate is causal, since a token's score is its own."""

  config: Gated

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context, cache: Cache | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Mixes `x` [B, T, D]; see `AttentionConfig.build`."""
    c = self.config
    query = self.unmade_queries(x, context)
    key = self.latents(x, context)
    # float32: the scores are ranked, and rounding makes ties.
    w = weight(self, 'gate', (x.shape[-1], 1), ('embed', None), dtype=jnp.float32)
    gate = jnp.einsum('btd,dk->btk', x.astype(jnp.float32), w)[..., 0]
    positions = context.positions
    if cache is None:
      seen = context.own()
      chosen = Chosen(self.choose(gate, seen, context), c.block, seen)
    else:
      slots = context.slots(cache.gate.shape[1])
      tokens = cache.tokens.write(slots, *key, positions)
      rows = jnp.arange(slots.shape[0])[:, None]
      gate = cache.gate.at[rows, slots].set(gate, mode='drop')
      cache = GatedCache(tokens=tokens, gate=gate)
      key = (tokens.latent, tokens.rope_key)
      chosen = Chosen((self.choose_cached(gate, tokens.positions, positions),))
    bias = c.gradient.bias(gate)
    matrices = self.up(x.dtype), self.output_matrix(x.shape[-1], x.dtype)
    y, _ = self.mix_chosen(query, key, matrices, chosen, context, bias)
    return y, cache

  def choose(self, gate: jax.Array, seen: Seen, context: Context) -> tuple[jax.Array, ...]:
    """Returns the keys [B, N, m] of the blocks of a row, in parts with more and more keys."""
    c, length = self.config, gate.shape[1]
    first = block_sets.leaders(seen, c.block, c.window)
    starts = jnp.arange(0, length, c.block)
    # Devices that share the row all have as many keys to a block.
    staged = isinstance(c.keep, Share) and not context.sequence_axes
    edge = -(-len(starts) // STAGES) if staged else len(starts)
    counts = c.keep.counts(length)
    ranked = ranks(gate, seen.key_positions)
    found = []
    for begin in range(0, len(starts), edge):
      blocks = slice(begin, min(begin + edge, len(starts)))
      # The last block begins here: no more lies before it.
      most = int(counts[(blocks.stop - 1) * c.block])

      def select(queries, ranked, seen, ordered, most: int = most):
        del queries, ordered
        return select_prefix(ranked, seen, jnp.asarray(counts), most)

      kept = choose_spread(select, (), ranked, first.at(blocks), context)
      found.append(block_sets.joined(kept, starts[blocks], length, c.block, c.window))
    return tuple(found)

  def choose_cached(self, gate: jax.Array, slots: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns the slots [B, T, m] that each token of a sequence attends to.

    Args:
      gate: [B, S] scores of what is remembered.
      slots: [B, S] its positions.
      positions: [B, T] of the tokens.
    """
    c, length = self.config, gate.shape[1]
    starts = block_sets.cached_starts(positions, c.block)
    counts = c.keep.counts(length)
    seen = Seen(starts - c.window - 1, slots)
    kept = select_prefix(ranks(gate, slots), seen, jnp.asarray(counts), int(counts[-1]))
    sets = block_sets.joined(kept, starts, length, c.block, c.window)
    return block_sets.of_tokens(sets, positions, c.block)


def ranks(gate: jax.Array, positions: jax.Array) -> jax.Array:
  """Returns what keys are ranked by, [B, S] float32.

  Equal tokens have equal scores in the first layer. The later one wins, by a margin well above
  rounding, so that the choice is the same in every batch shape.
  """
  return gate + positions * LATER_WINS
