"""Compressed sparse attention: a window, and the entries that an indexer finds worth a look."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.compressor import (
  COMPRESSED_AXES,
  Compressed,
  Compressor,
  empty_compressed,
)
from deepseek_jax.layers.attention.hca import COMPRESSED_ROPE, seen_entries
from deepseek_jax.layers.attention.indexer import Index, add_indexer_loss
from deepseek_jax.layers.attention.interface import Cache
from deepseek_jax.layers.attention.rope import RoPE
from deepseek_jax.layers.attention.shards import attend_chosen_sharded
from deepseek_jax.layers.attention.shared_window import (
  RECENT_AXES,
  Shared,
  SharedAttention,
  one_sequence,
  own_axes,
  with_window,
)
from deepseek_jax.layers.attention.spread import Whole, choose_spread, with_all_keys
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.weights import weight
from deepseek_jax.ops.attention.blocks import Extras
from deepseek_jax.ops.attention.compressed import Keys, window_slots
from deepseek_jax.ops.attention.divergence import selected_divergence
from deepseek_jax.ops.attention.gathered import KeySets
from deepseek_jax.ops.attention.reference import Seen
from deepseek_jax.ops.attention.select import select_top_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class CSA(Shared):
  """Attention to a window of tokens and to the `top_k` entries that an indexer scores highest.

  An entry pools a block of `ratio` tokens and the block before it. The indexer has entries of its
  own. No loss reaches it through the choice, so it has one of its own: the KL of its scores of the
  chosen entries from the attention that goes to them, as in V3.2. It learns from nothing else, and
  nothing else learns from it.

  Attributes:
    ratio: tokens r of a block.
    top_k: entries k that a query attends to.
    index_heads: heads J of the indexer.
    index_dim: channels of an index head, of which the last `rope_dim` are rotated.
    index_loss: factor on the indexer's loss: its mean KL a token; 0 leaves it as it is.

  Source: DeepSeek-V4, arXiv 2606.19348, section 2.3.1; the loss: DeepSeek-V3.2-Exp, equation 4.
  """

  ratio: int = 4
  top_k: int = 512
  index_heads: int = 64
  index_dim: int = 128
  index_loss: float = 1.0
  rope: RoPE = COMPRESSED_ROPE

  def __post_init__(self):
    super().__post_init__()
    errors = []
    if self.rope_dim > self.index_dim:
      errors.append(f'`rope_dim` {self.rope_dim} is more than `index_dim` {self.index_dim}')
    if self.index_loss < 0:
      errors.append(f'`index_loss` is {self.index_loss}; expected 0 or more')
    if self.stored is not None:
      faults = self.stored.check(self.head_dim - self.rope_dim, self.index_dim)
      errors += [f'stored: {message}' for message in faults]
    if errors:
      raise ConfigError(errors)

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return CSAttention(self, name=name)

  def mixing_flops(self, length: int) -> float:
    """Forward FLOPs a token over `length` causal tokens, on average: attention and index scores."""
    seen = seen_entries(length, self.ratio)
    attended = float(np.mean(np.minimum(seen, self.top_k)))
    scores = self.index_heads * (2 * self.index_dim + 2) * float(np.mean(seen))
    return super().mixing_flops(length) + 4 * self.heads * self.head_dim * attended + scores

  def empty_cache(self, batch: int, length: int, dtype: DTypeLike, spare: int = 0) -> 'CSACache':
    """Returns an empty cache: the window, and two entries for every `ratio` of `length` tokens."""
    past, index = (
      empty_compressed(batch, length, dim, self.ratio, 2, dtype, spare)
      for dim in (self.head_dim, self.index_dim)
    )
    return CSACache(recent=self.empty_recent(batch, length, dtype, spare), past=past, index=index)

  def cache_axes(self) -> 'CSACache':
    """Returns the logical axes of the cache."""
    return CSACache(recent=RECENT_AXES, past=COMPRESSED_AXES, index=COMPRESSED_AXES)  # type: ignore[arg-type]


@struct.dataclass
class CSACache:
  """The last tokens [B, W, C], the entries [B, N, C] of all, and those of the indexer."""

  recent: jax.Array
  past: Compressed
  index: Compressed


class CSAttention(SharedAttention):
  """[B, T, D] -> [B, T, D], over a cache that grows by two entries every `ratio` tokens."""

  config: CSA

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context, cache: Cache | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Mixes `x` [B, T, D]; see `AttentionConfig.build`."""
    context = context if cache is None else one_sequence(context)
    old = (None,) * 3 if cache is None else (cache.recent, cache.past, cache.index)
    latent, query = self.queries(x, context)
    tokens, recent = self.recall(self.keys(x, context), context, old[0])
    with jax.named_scope('compress'):
      entries, past = self.compressor(self.config.head_dim, 'key')(x, context, old[1])
    indices, scorer, index = self.choose(x, latent, context, old[2])
    learning = self.is_mutable_collection('losses') and not self.is_initializing()
    learning = learning and cache is None and self.config.index_loss > 0
    sinks = self.sinks()
    heads, mass = self.attend_chosen(query, context, tokens, entries, indices, sinks, learning)
    if mass is not None:
      with jax.named_scope('divergence'):
        gap = index_gap(scorer, indices, mass, context)
      add_indexer_loss(self, gap, context, self.config.index_loss)
    y = self.project(heads, x.shape[-1])
    if recent is None or past is None or index is None:
      return y, None
    return y, CSACache(recent=recent, past=past, index=index)

  def compressor(self, dim: int, role: Literal['key', 'index']) -> Compressor:
    """Returns the module that makes entries of `dim` channels."""
    c, name = self.config, {'key': 'compressor', 'index': 'index_compressor'}[role]
    return Compressor(dim, c.ratio, 2, c.rope_dim, c.rope, c.norm, c.stored, role, name=name)

  def attend_chosen(
    self,
    query: jax.Array,
    context: Context,
    tokens: Keys,
    entries: Keys,
    indices: jax.Array,
    sinks: jax.Array,
    mass: bool,
  ) -> tuple[jax.Array, jax.Array | None]:
    """Mixes the window and chosen entries.

    Every query has its window among its keys, as it has the entries: so one softmax and one kernel
    serve both.

    Args:
      query: [B, T, H, C].
      context: facts about the T tokens.
      tokens: from `recall`.
      entries: what stands for older tokens.
      indices: [B, T, k] int32 entries of each query; -1 is none.
      sinks: [H] float32 logit of each head without a value.
      mass: whether the entries' weights are wanted.

    Returns:
      [B, T, H, C], turned back to position 0; and the attention to the entries of `indices`, summed
      over heads, [B, T, k] float32, or None.
    """
    c, axes = self.config, own_axes(tokens, context)

    def mix(own, entries, whole):
      query, positions, segments, tokens, indices = own
      tokens = with_window(tokens, c.window, axes)
      near = window_slots(positions, segments, tokens, c.window)
      far = jnp.where(indices >= 0, indices + tokens.rows.shape[1], -1)
      return attend_chosen_sharded(
        query,
        jnp.concatenate([tokens.rows, entries], axis=1),
        c.head_dim,
        KeySets(jnp.concatenate([near, far], axis=-1)),
        context.rules,
        scale=c.head_dim**-0.5,
        extras=Extras(sinks=whole.weights),
        mass=mass,
      )

    own = query, context.positions, context.segments, tokens, indices
    found = with_all_keys(mix, own, entries.rows, Whole(sinks), context, axes)
    weights = None if found.mass is None else found.mass[..., c.window :]
    return self.turn_back(found.out, context), weights

  def choose(
    self, x: jax.Array, latent: jax.Array, context: Context, past: Compressed | None
  ) -> tuple[jax.Array, Index, Compressed | None]:
    """Returns the entries of each query, [B, T, k] int32, by what, and the indexer's memory.

    Args:
      x: [B, T, D].
      latent: [B, T, Q] query latent.
      context: facts about the T tokens.
      past: what the indexer remembers, or None.
    """
    c = self.config
    x, latent = jax.lax.stop_gradient((x, latent))
    with jax.named_scope('indexer'):
      keys, after = self.compressor(c.index_dim, 'index')(x, context, past)
      shape = (c.query_latent, c.index_heads, c.index_dim)
      up = weight(self, 'index_query', shape, ('latent', 'heads', None), dtype=x.dtype)
      query = self.rotate(jnp.einsum('btq,qjc->btjc', latent, up), context.positions)
      query = query if c.stored is None else c.stored.round_index(query)
      width = x.shape[-1]
      mix = weight(self, 'index_weights', (width, c.index_heads), ('embed', None), dtype=x.dtype)
      weights = jnp.einsum('btd,dj->btj', x, mix, preferred_element_type=jnp.float32)
      weights *= (c.index_heads * c.index_dim) ** -0.5
    seen = Seen(context.positions, keys.positions, context.segments, keys.segments)
    most = min(c.top_k, keys.rows.shape[1])
    scorer = Index(query, keys.rows, weights)
    if past is not None:
      return select_top_k(*scorer, seen, most), scorer, after

    def select(queries, key, seen, ordered):
      del ordered
      return select_top_k(queries[0], key, queries[1], seen, most)

    chosen = choose_spread(select, (query, weights), keys.rows, seen, context)
    return chosen, scorer, after


def index_gap(scorer: Index, indices: jax.Array, mass: jax.Array, context: Context) -> jax.Array:
  """Returns the indexer's KL of every query over the entries it attends to, [B, T] float32.

  Args:
    scorer: what entries were chosen by.
    indices: [B, T, k] int32 entries of each query.
    mass: [B, T, k] attention to them.
    context: facts about the T tokens.
  """

  def gap(own, key, whole):
    del whole
    query, weights, indices, mass = own
    return selected_divergence(query, key, weights, KeySets(indices), mass)

  own = scorer.query, scorer.weights, indices, mass
  return with_all_keys(gap, own, scorer.key, Whole(), context)
