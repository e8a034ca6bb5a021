"""DeepSeek Sparse Attention: an indexer looks at all tokens, attention at the best of them."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.chosen import Chosen, ChosenAttention
from deepseek_jax.layers.attention.index_target import (
  Attended,
  index_divergence,
  summed_attention,
)
from deepseek_jax.layers.attention.indexer import Index, Indexer, LightningIndexer, add_indexer_loss
from deepseek_jax.layers.attention.interface import Cache, block_faults
from deepseek_jax.layers.attention.latent import (
  LATENT_CACHE_AXES,
  Latent,
  LatentCache,
  Queries,
  empty_latent_cache,
)
from deepseek_jax.layers.attention.spread import choose_spread
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.context_parallel import Order
from deepseek_jax.layers.weights import observe
from deepseek_jax.ops.attention import block_sets
from deepseek_jax.ops.attention.divergence import membership, selection_quality
from deepseek_jax.ops.attention.reference import Seen, visible
from deepseek_jax.ops.attention.select import select_top_k

SAMPLES = 16
"""Queries of a row whose selection is looked into at every step."""
NEAR = 128
"""Positions up to the query's own that are called near in what is observed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Each:
  """Every query has keys of its own: what the paper does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
  """A block of queries shares keys: those its first query chooses, its window, and itself.

  Products of blocks instead of gathers, and one selection for many queries; what a later query of
  the block would have chosen differently is lost.

  Attributes:
    block: queries of a block.
    window: tokens before a block that it sees in any case.
  """

  block: int = 64
  window: int = 64

  def __post_init__(self):
    errors = []
    if self.block < 1:
      errors.append(f'`block` is {self.block}; expected 1 or more queries')
    if self.window < 0:
      errors.append(f'`window` is {self.window}; expected 0 or more tokens')
    if errors:
      raise ConfigError(errors)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stage:
  """A stage of training.

  Attributes:
    weight: factor on the indexer's loss: its mean KL a token.
  """

  weight: float = 1.0

  def __post_init__(self):
    if not self.weight > 0:
      raise ConfigError(f'`weight` is {self.weight}; expected a number above 0')


class WarmUp(_Stage):
  """Attention is dense, and the indexer learns to tell where it goes.

  Everything else is to be frozen: `trainable=('*/attention/indexer/*',)` in the experiment.

  Source: DeepSeek-V3.2-Exp, section 2.1.1, equation 3.
  """


class Sparse(_Stage):
  """Attention is sparse; the indexer learns from what it has selected, all else from the text.

  Source: DeepSeek-V3.2-Exp, section 2.1.1, equation 4.
  """


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSA(Latent):
  """Latent attention to the tokens that a lightning indexer selects.

  The indexer scores all pairs, which costs 2 J d FLOPs each, and holds those of a few queries at a
  time; attention costs what the selected tokens cost, in time and memory, both ways. The weights
  are those of MLA and the indexer's: with `top_k` of the whole length it computes what MLA does.

  Attributes:
    top_k: tokens a query selects; where it sees fewer, it selects them all.
    indexer: sizes of the indexer.
    sharing: whether each query selects for itself.
    stage: of training. Sparse is also how the model is used.

  Source: DeepSeek-V3.2-Exp, section 2.
  """

  top_k: int = 2048
  indexer: Indexer = Indexer()
  sharing: Each | Shared = Each()
  stage: WarmUp | Sparse = Sparse()

  def __post_init__(self):
    super().__post_init__()
    errors = [f'indexer: {message}' for message in self.indexer.check(self.rope_dim)]
    if self.stored is not None:
      faults = self.stored.check(self.latent, self.indexer.dim)
      errors += [f'stored: {message}' for message in faults]
    if self.top_k < 1:
      errors.append(f'`top_k` is {self.top_k}; expected 1 or more')
    if errors:
      raise ConfigError(errors)

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return SparseAttention(self, name=name)

  def visible_tokens(self, length: int) -> float:
    """Mean number of tokens that a token of a `length`-token segment attends to."""
    if isinstance(self.stage, WarmUp):
      return super().visible_tokens(length)
    if isinstance(self.sharing, Each):
      return sum(min(t + 1, self.top_k) for t in range(length)) / length
    block, window = self.sharing.block, self.sharing.window
    past = [max(t // block * block - window, 0) for t in range(length)]
    return sum(min(p, self.top_k) + t + 1 - p for t, p in enumerate(past)) / length

  def mixing_flops(self, length: int) -> float:
    """Forward FLOPs a token: the indexer's scores of all pairs, and attention to the selected.

    Where queries select for themselves, attention is absorbed, and a pair costs 2 H (2 C + R).
    """
    scorers = 1.0
    if isinstance(self.stage, Sparse) and isinstance(self.sharing, Shared):
      scorers = 1 / self.sharing.block
    index = 2 * self.indexer.heads * self.indexer.dim * (length + 1) / 2 * scorers
    if isinstance(self.stage, WarmUp) or isinstance(self.sharing, Shared):
      return super().mixing_flops(length) + index
    per_pair = 2 * self.heads * (2 * self.latent + self.rope_dim)
    return per_pair * self.visible_tokens(length) + index

  def check_shared(self, tokens: int, order: Order) -> list[str]:
    """Returns what is wrong with devices that have so many tokens of a row each, as messages."""
    if isinstance(self.sharing, Each):
      return []
    return block_faults(self.sharing.block, tokens, order, 'sharing.block')

  def empty_cache(self, batch: int, length: int, dtype: DTypeLike, spare: int = 0) -> 'SparseCache':
    """Returns an empty cache of `length` slots; a token's slot is its position."""
    del spare  # See MLA.
    c, query, weights = self.indexer, None, None
    if isinstance(self.sharing, Shared):
      blocks = -(-length // self.sharing.block)
      query = jnp.zeros((batch, blocks, c.heads, c.dim), dtype)
      weights = jnp.zeros((batch, blocks, c.heads), jnp.float32)
    return SparseCache(
      tokens=empty_latent_cache(self, batch, length, dtype),
      index_key=jnp.zeros((batch, length, c.dim), dtype),
      leader_query=query,
      leader_weights=weights,
    )

  def cache_axes(self) -> 'SparseCache':
    """Returns the logical axes of the cache."""
    shared = isinstance(self.sharing, Shared)
    return SparseCache(
      tokens=LATENT_CACHE_AXES,
      index_key=('batch', 'cache_length', None),  # type: ignore[arg-type]
      leader_query=('batch', None, None, None) if shared else None,  # type: ignore[arg-type]
      leader_weights=('batch', None, None) if shared else None,  # type: ignore[arg-type]
    )


@struct.dataclass
class SparseCache:
  """What sparse attention remembers.

  Attributes:
    tokens: the latent cache.
    index_key: [B, S, d] index key of each token.
    leader_query: [B, N, J, d] index queries of the first token of each block, which selects for
      the others; None where each selects for itself.
    leader_weights: [B, N, J] their weights, likewise.
  """

  tokens: LatentCache
  index_key: jax.Array
  leader_query: jax.Array | None = None
  leader_weights: jax.Array | None = None


class SparseAttention(ChosenAttention):
  """[B, T, D] -> [B, T, D]; reports the loss `indexer` and how good the selection is."""

  config: DSA

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context, cache: Cache | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Mixes `x` [B, T, D]; see `AttentionConfig.build`."""
    c = self.config
    query = self.unmade_queries(x, context)
    key = self.latents(x, context)
    with jax.named_scope('indexer'):
      index = LightningIndexer(c.indexer, c, name='indexer')(x, query.source, context)
    dense = isinstance(c.stage, WarmUp)
    if cache is not None:
      cache = self.remember(cache, key, index, context)
      key = (cache.tokens.latent, cache.tokens.rope_key)
      if dense:
        seen = Seen(context.positions, cache.tokens.positions)
        heads = self.mix_seen(query.make(c), key, seen, context)
        return self.project(heads, x.shape[-1]), cache
      matrices = self.up(x.dtype), self.output_matrix(x.shape[-1], x.dtype)
      chosen = self.choose_cached(cache, index, context)
      return self.mix_chosen(query, key, matrices, chosen, context)[0], cache
    seen = context.own()
    learning = self.is_mutable_collection('losses') and not self.is_initializing()
    if dense:
      y = self.project(self.mix_own(query.make(c), key, context), x.shape[-1])
      if learning:
        self.report(query, key, index, seen, context)
      return y, None
    matrices = self.up(x.dtype), self.output_matrix(x.shape[-1], x.dtype)
    chosen = self.choose(index, seen, context)
    y, mass = self.mix_chosen(query, key, matrices, chosen, context, mass=learning)
    if learning:
      self.report(query, key, index, seen, context, chosen, mass)
    return y, None

  def choose(self, index: Index, seen: Seen, context: Context) -> Chosen:
    """Selects the keys of the T tokens of a row among themselves.

    Where devices share the row, the index keys of all come to each, and the choice is that of one.
    """
    c, length = self.config, index.key.shape[1]
    top_k = min(c.top_k, length)
    each = isinstance(c.sharing, Each)

    def select(queries, key, seen, ordered):
      query, weights = queries
      return select_top_k(query, key, weights, seen, top_k, ordered=ordered and each)

    if isinstance(c.sharing, Each):
      queries = index.query, index.weights
      return Chosen((choose_spread(select, queries, index.key, seen, context),))
    block, window = c.sharing.block, c.sharing.window
    first = block_sets.leaders(seen, block, window)
    queries = index.query[:, ::block], index.weights[:, ::block]
    found = choose_spread(select, queries, index.key, first, context)
    starts = jnp.arange(0, length, block)
    sets = block_sets.joined(found, starts, length, block, window)
    return Chosen((sets,), block, seen)

  def choose_cached(self, cache: SparseCache, index: Index, context: Context) -> Chosen:
    """Selects the slots that the T tokens after what is remembered attend to."""
    c, slots, positions = self.config, cache.tokens.positions, context.positions
    top_k = min(c.top_k, slots.shape[1])
    if isinstance(c.sharing, Each):
      seen = Seen(positions, slots)
      return Chosen((select_top_k(index.query, cache.index_key, index.weights, seen, top_k),))
    block, window = c.sharing.block, c.sharing.window
    starts = block_sets.cached_starts(positions, block)
    query, weights = (
      jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode='clip'))(x, starts // block)
      for x in (cache.leader_query, cache.leader_weights)
    )
    seen = Seen(starts - window - 1, slots)
    found = select_top_k(query, cache.index_key, weights, seen, top_k)
    sets = block_sets.joined(found, starts, slots.shape[1], block, window)
    return Chosen((block_sets.of_tokens(sets, positions, block),))

  def remember(
    self,
    cache: SparseCache,
    key: tuple[jax.Array, jax.Array],
    index: Index,
    context: Context,
  ) -> SparseCache:
    """Writes the tokens of the context."""
    positions, sharing = context.positions, self.config.sharing
    rows = jnp.arange(positions.shape[0])[:, None]
    slots = context.slots(cache.index_key.shape[1])
    query, weights = cache.leader_query, cache.leader_weights
    if isinstance(sharing, Shared) and query is not None and weights is not None:
      leads = context.real & (positions % sharing.block == 0)
      place = jnp.where(leads, positions // sharing.block, query.shape[1])
      query = query.at[rows, place].set(index.query.astype(query.dtype), mode='drop')
      weights = weights.at[rows, place].set(index.weights, mode='drop')
    new_key = index.key.astype(cache.index_key.dtype)
    return SparseCache(
      tokens=cache.tokens.write(slots, *key, positions),
      index_key=cache.index_key.at[rows, slots].set(new_key, mode='drop'),
      leader_query=query,
      leader_weights=weights,
    )

  def report(
    self,
    query: Queries,
    key: tuple[jax.Array, jax.Array],
    index: Index,
    seen: Seen,
    context: Context,
    chosen: Chosen | None = None,
    mass: jax.Array | None = None,
  ) -> None:
    """Adds the indexer's loss, and observes what it selects for some queries.

    Args:
      query: the queries, not made yet.
      key: the pair that `latents` returns.
      index: of the same tokens.
      seen: who sees whom.
      context: facts about the tokens.
      chosen: what was attended to; None is everything.
      mass: [B, T, m] attention to it.
    """
    c, real = self.config, jnp.asarray(context.real, jnp.float32)
    # The target is what the model does: the indexer follows it, not the other way round.
    up: jax.Array = self.get_variable('params', 'key_value_up')
    query, key, up = jax.lax.stop_gradient((query, key, up))
    target = Attended(query, key, up[..., : c.nope_dim].astype(query.source.dtype))
    with jax.named_scope('divergence'):
      gap = index_divergence(c, target, index, seen, context, chosen, mass)
    add_indexer_loss(self, gap, context, c.stage.weight)
    if not self.is_mutable_collection('observed'):
      return
    length = gap.shape[1]
    rows = context.places(np.arange(min(SAMPLES, length)) * length // min(SAMPLES, length))
    part = seen.at(jnp.asarray(rows))
    if chosen is None:
      q, w = index.query[:, rows], index.weights[:, rows]
      lists = select_top_k(q, index.key, w, part, min(c.top_k, length))
    else:
      lists = chosen.indices[0][:, rows // chosen.block]
      places = jnp.asarray(context.places(np.arange(length)), jnp.int32)
      lists = jnp.where(lists >= 0, places[lists], -1)
    mask = visible(*part)
    found = membership(lists, length) & mask
    attention = summed_attention(c, target, seen, jnp.asarray(rows))
    recall, coverage = selection_quality(attention, found, mask)
    near = part.query_positions[:, :, None] - part.key_positions[:, None, :] < NEAR
    close = jnp.sum(found & near, axis=-1) / jnp.maximum(jnp.sum(found, axis=-1), 1)
    facts = {'recall': recall, 'coverage': coverage, 'near': close, 'divergence': gap[:, rows]}
    sums = {name: jnp.sum(fact * real[:, rows]) for name, fact in facts.items()}
    observe(self, 'indexer', {**sums, 'queries': jnp.sum(real[:, rows])})
