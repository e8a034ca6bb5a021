"""Native sparse attention: compressed tokens, selected blocks and a window, weighed by gates."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.layers.attention import ring
from deepseek_jax.layers.attention.interface import Cache
from deepseek_jax.layers.attention.mha import (
  HEAD_CACHE_AXES,
  HeadAttention,
  HeadCache,
  empty_head_cache,
)
from deepseek_jax.layers.attention.rope import RoPE
from deepseek_jax.layers.attention.shards import attend_groups_sharded, attend_sharded
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.weights import Met, vector, weight
from deepseek_jax.ops.attention.pieces import cut, joined
from deepseek_jax.ops.attention.reference import Seen
from deepseek_jax.ops.attention.spans import Spans, find_spans, overlaps, rank_blocks
from deepseek_jax.sharding.rules import Rules

CHUNK = 1024
"""Queries whose keys are named one by one at once: their names alone are 4 · k bytes a query."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NSA:
  """Grouped-query attention in three branches, each with keys and values of its own.

  One looks at entries that each stand for a span of `span` tokens, made by a small network. One
  looks at the tokens of `blocks` blocks: those that the first branch gives most attention, with
  the first `initial` and the last `local` always among them; the heads of a group choose together.
  One looks at the last `window` tokens. Gates of the token weigh the three.

  The paper leaves open how entries know where they are: here an entry's key is rotated to the
  position of its span's first token.

  Attributes:
    heads: query heads H.
    kv_heads: key and value heads G, each shared by H / G query heads.
    head_dim: channels of a query or key head.
    value_dim: channels of a value head; None is `head_dim`.
    span: tokens that an entry stands for.
    stride: tokens from one span to the next.
    block: tokens of a block that is selected whole.
    blocks: blocks that a query attends to, its own among them.
    initial: blocks at the start that are always among them.
    local: blocks up to the query's own that are always among them.
    window: tokens that the third branch sees, the query's own among them.
    rope: rotary embedding.

  Source: Yuan et al., arXiv 2502.11089, section 3.
  """

  heads: int
  kv_heads: int = 4
  head_dim: int = 192
  value_dim: int | None = 128
  span: int = 32
  stride: int = 16
  block: int = 64
  blocks: int = 16
  initial: int = 1
  local: int = 2
  window: int = 512
  rope: RoPE = RoPE()

  def __post_init__(self):
    sizes = ('heads', 'kv_heads', 'head_dim', 'value_dim', 'span', 'stride', 'block', 'blocks')
    errors = wrong_sizes(self, (*sizes, 'local', 'window'))
    if self.head_dim % 2:
      errors.append(f'`head_dim` is {self.head_dim}; rotary pairs need an even number')
    if self.initial < 0:
      errors.append(f'`initial` is {self.initial}; expected 0 or more')
    if not errors:
      errors += [
        f'`{a}` {getattr(self, a)} does not divide `{b}` {getattr(self, b)}'
        for a, b in (('kv_heads', 'heads'), ('stride', 'span'), ('stride', 'block'))
        if getattr(self, b) % getattr(self, a)
      ]
      if self.initial + self.local > self.blocks:
        errors.append(
          f'`blocks` is {self.blocks}, fewer than `initial` {self.initial} and `local` {self.local}'
        )
    if errors:
      raise ConfigError(errors)

  @property
  def values(self) -> int:
    """Channels V of a value head."""
    return self.head_dim if self.value_dim is None else self.value_dim

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return NativeSparseAttention(self, name=name)

  def mixing_flops(self, length: int) -> float:
    """Forward FLOPs a token over `length` causal tokens, on average.

    Pairs of the three branches, and the scores of the entries once more, for the choice.
    """
    place = np.arange(length)
    entries = np.maximum(place + 1 - self.span, -self.stride) // self.stride + 1
    own = place // self.block
    near = place + 1 - np.maximum(own + 1 - self.local, 0) * self.block
    far = np.minimum(np.maximum(own + 1 - self.local, 0), self.blocks - self.local) * self.block
    pairs = float(np.mean(entries + near + far + np.minimum(place + 1, self.window)))
    both = 2 * self.heads * (self.head_dim + self.values) * pairs
    return both + 2 * self.heads * self.head_dim * float(np.mean(entries))

  def met(self) -> dict[str, Met]:
    """Returns what a token does with the weights that make entries: one every `stride` tokens."""
    found = {}
    for name in ('key', 'value'):
      found[f'{name}_pool'] = found[f'{name}_pool_out'] = Met(1.0, self.kv_heads / self.stride)
      found[f'{name}_places'] = Met(0.0)
    return found

  def empty_cache(self, batch: int, length: int, dtype: DTypeLike, spare: int = 0) -> 'NSACache':
    """Returns an empty cache: all tokens once, their entries, and the last tokens twice."""
    width = self.kv_heads * (self.head_dim + self.values)
    blank = lambda slots: jnp.zeros((batch, slots, width), dtype)  # noqa: E731
    return NSACache(
      selected=empty_head_cache(batch, length, self.kv_heads, self.head_dim, dtype, self.values),
      entries=blank(max((length - self.span) // self.stride + 1, 1)),
      unpooled=blank(self.span - 1 + spare),
      recent=blank(min(self.window, length) + spare),
    )

  def cache_axes(self) -> 'NSACache':
    """Returns the logical axes of the cache."""
    return NSACache(
      selected=HEAD_CACHE_AXES,
      entries=('batch', 'cache_length', None),  # type: ignore[arg-type]
      unpooled=('batch', None, None),  # type: ignore[arg-type]
      recent=('batch', None, None),  # type: ignore[arg-type]
    )


@struct.dataclass
class NSACache:
  """What native sparse attention remembers; W is G · (K + V), keys and values of all groups.

  Attributes:
    selected: keys and values of all tokens, for the branch of selected blocks.
    entries: [B, N, W] entries so far; slot i begins at position i · stride.
    unpooled: [B, span - 1 or more, W] a ring of the last tokens of the first branch, which entries
      to come need.
    recent: [B, window or more, W] a ring of the last tokens of the third branch.
  """

  selected: HeadCache
  entries: jax.Array
  unpooled: jax.Array
  recent: jax.Array


class Pairs(NamedTuple):
  """Keys [B, S, G, K] and values [B, S, G, V] of some tokens or entries, and their positions."""

  key: jax.Array
  value: jax.Array
  positions: jax.Array
  segments: jax.Array | None


class Choice(NamedTuple):
  """Which tokens each query attends to in the branch of selected blocks.

  Attributes:
    chosen: [B, T, G, n] int32 blocks; -1 is none.
    tokens: [B, M, block] int32 places of the blocks' tokens; -1 where there is no block.
    begins: [B, T] int32 place of the first token that is seen in any case.
    places: [B, T] int32 place of the query's own token, the last that is seen.
  """

  chosen: jax.Array
  tokens: jax.Array
  begins: jax.Array
  places: jax.Array


class NativeSparseAttention(HeadAttention):
  """[B, T, D] -> [B, T, D]; see `NSACache` for what it remembers."""

  config: NSA

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context, cache: Cache | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Mixes `x` [B, T, D]; see `AttentionConfig.build`."""
    c = self.config
    query = c.rope.rotate(self.heads(x, 'query', c.heads, c.head_dim, context), context.positions)
    gates = weight(self, 'gate', (x.shape[-1], c.heads, 3), ('embed', 'heads', None), dtype=x.dtype)
    gates = jax.nn.sigmoid(jnp.einsum('btd,dhc->cbth', x, gates))[..., None]
    entries, spans, cache = self.compress(x, context, cache)
    selected, cache = self.remember(x, context, cache)
    recent, cache = self.recall(x, context, cache)
    own = context.positions, None if cache is not None else context.segments
    scale = c.head_dim**-0.5

    def dense(pairs: Pairs, **options: Any) -> jax.Array:
      seen = Seen(own[0], pairs.positions, own[1], pairs.segments)
      return attend_sharded(
        query, pairs.key, pairs.value, seen, context.rules, scale=scale, **options
      )

    with jax.named_scope('compressed'):
      mixed = gates[0] * dense(entries)
    with jax.named_scope('selected'):
      choice = self.choose(query, entries, spans, selected, context)
      mixed += gates[1] * self.attend_chosen(query, selected, choice, context.rules)
    with jax.named_scope('window'):
      mixed += gates[2] * dense(recent, window=(c.window, 0), in_order=cache is None)
    return self.project(mixed, x.shape[-1], context), cache

  def pairs(
    self, x: jax.Array, name: str, context: Context, rotate: bool = True
  ) -> tuple[jax.Array, jax.Array]:
    """Returns keys [B, T, G, K] and values [B, T, G, V] of one branch."""
    c = self.config
    key = self.heads(x, f'{name}_key', c.kv_heads, c.head_dim, context)
    value = self.heads(x, f'{name}_value', c.kv_heads, c.values, context)
    return c.rope.rotate(key, context.positions) if rotate else key, value

  def remember(
    self, x: jax.Array, context: Context, cache: Cache | None
  ) -> tuple[Pairs, Cache | None]:
    """Returns what blocks are selected from, and the cache with the new tokens in it."""
    key, value = self.pairs(x, 'selected', context)
    if cache is None:
      return Pairs(key, value, context.positions, context.segments), None
    kept = cache.selected
    kept = kept.write(context.slots(kept.positions.shape[1]), key, value, context.positions)
    pairs = Pairs(kept.key.astype(x.dtype), kept.value.astype(x.dtype), kept.positions, None)
    return pairs, cache.replace(selected=kept)

  def recall(
    self, x: jax.Array, context: Context, cache: Cache | None
  ) -> tuple[Pairs, Cache | None]:
    """Returns what windows look into, and the cache with the new tokens in it."""
    key, value = self.pairs(x, 'window', context)
    if cache is None:
      return Pairs(key, value, context.positions, context.segments), None
    flat = self.flat(key, value)
    own = jnp.where(context.real, context.positions, -1)
    count = min(self.config.window, cache.recent.shape[1])
    old, places = ring.before(cache.recent, context.positions, count)
    rows = jnp.concatenate([old.astype(x.dtype), flat], axis=1)
    positions = jnp.concatenate([jnp.maximum(places, -1), own], axis=1)
    recent = ring.write(cache.recent, flat, context.positions, context.real)
    cache = cache.replace(recent=recent)
    return Pairs(*self.apart(rows), positions, None), cache

  def compress(
    self, x: jax.Array, context: Context, cache: Cache | None
  ) -> tuple[Pairs, Spans | None, Cache | None]:
    """Returns the entries, where their spans end if all are of `x`, and the cache after them."""
    c = self.config
    flat = self.flat(*self.pairs(x, 'compressed', context, rotate=False))
    if cache is None:
      spans = find_spans(context.positions, context.segments, c.span, c.stride)
      entries = Pairs(*self.apart(self.pool(flat, spans)), spans.positions, spans.segments)
      return entries, spans, None
    earlier = c.span - 1
    old, before = ring.before(cache.unpooled, context.positions, earlier)
    positions = jnp.concatenate([before, context.positions], axis=1)
    there = jnp.concatenate([before >= 0, context.real], axis=1)
    spans = find_spans(positions, there.astype(jnp.int32), c.span, c.stride, first=earlier)
    made = self.pool(jnp.concatenate([old.astype(x.dtype), flat], axis=1), spans)
    slots = cache.entries.shape[1]
    place = jnp.where(spans.positions < 0, slots, (spans.positions - earlier) // c.stride)
    rows = jnp.arange(x.shape[0])[:, None]
    made = made.astype(cache.entries.dtype)
    cache = cache.replace(
      entries=cache.entries.at[rows, place].set(made, mode='drop'),
      unpooled=ring.write(cache.unpooled, flat, context.positions, context.real),
    )
    # Where an entry lies says when it is complete. A query sees none of what is not there yet.
    ends = jnp.broadcast_to(jnp.arange(slots) * c.stride + earlier, (x.shape[0], slots))
    return Pairs(*self.apart(cache.entries.astype(x.dtype)), ends, None), None, cache

  def pool(self, tokens: jax.Array, spans: Spans) -> jax.Array:
    """Makes an entry [B, N, W] of the tokens [B, S, W] of each span."""
    c = self.config
    found = jnp.maximum(spans.tokens(c.span), 0)
    picked = jax.vmap(lambda x, i: x[i])(tokens, found)
    entries = []
    for name, part in zip(('key', 'value'), self.apart(picked), strict=True):
      dim = part.shape[-1]
      # [B, N, span, G, K]: the same network serves all groups.
      part += vector(self, f'{name}_places', np.zeros((c.span, 1, dim), np.float32), (None,) * 3)
      first = weight(
        self, f'{name}_pool', (c.span, dim, dim), (None,) * 3, dtype=tokens.dtype, inputs=2
      )
      second = weight(self, f'{name}_pool_out', (dim, dim), (None, None), dtype=tokens.dtype)
      hidden = jax.nn.silu(jnp.einsum('bnsgk,skj->bngj', part.astype(tokens.dtype), first))
      entries.append(jnp.einsum('bngj,jk->bngk', hidden, second))
    begins = jnp.maximum(spans.positions - c.span + 1, 0)
    return self.flat(c.rope.rotate(entries[0], begins), entries[1])

  def choose(
    self,
    query: jax.Array,
    entries: Pairs,
    spans: Spans | None,
    selected: Pairs,
    context: Context,
  ) -> Choice:
    """Chooses blocks for every query and group of heads.

    Args:
      query: [B, T, H, K].
      entries: by whose attention blocks are chosen.
      spans: where the entries' spans end; None where their slots say it.
      selected: the tokens that blocks consist of.
      context: facts about the T tokens.
    """
    c, positions = self.config, context.positions
    batch, length = positions.shape
    keys = selected.key.shape[1]
    if spans is None:
      slots = jnp.broadcast_to(jnp.arange(keys), (batch, keys))
      ones = jnp.ones_like(slots)
      blocks, places, segments = find_spans(slots, ones, c.block, c.block), positions, None
      last = jnp.minimum(entries.positions, keys - 1)
      spans = Spans(last, entries.positions, jnp.ones_like(last))
    else:
      segments = context.segments
      blocks = find_spans(positions, segments, c.block, c.block)
      places = jnp.broadcast_to(jnp.arange(length), positions.shape)
    # The first position of the blocks that are always seen.
    near = positions - positions % c.block - (c.local - 1) * c.block
    chosen = rank_blocks(
      query,
      entries.key,
      Seen(positions, entries.positions, segments, entries.segments),
      overlaps(spans, c.span, blocks, c.block, keys) / c.span,
      Seen(near - 1, blocks.positions, segments, None if segments is None else blocks.segments),
      (blocks.positions >= 0) & (blocks.positions < c.initial * c.block),
      c.blocks - c.local,
      c.head_dim**-0.5,
    )
    begins = places - (positions - jnp.maximum(near, 0))
    return Choice(chosen, blocks.tokens(c.block), begins, places)

  def attend_chosen(
    self, query: jax.Array, pairs: Pairs, choice: Choice, rules: Rules
  ) -> jax.Array:
    """Attends from queries [B, T, H, K] to the tokens of their blocks, giving [B, T, H, V]."""
    c, length = self.config, query.shape[1]
    tokens = choice.tokens

    def attend(piece):
      query, chosen, begins, places = piece
      far = jax.vmap(lambda x, i: x[i])(tokens, jnp.maximum(chosen, 0))
      far = jnp.where(chosen[..., None] >= 0, far, -1)
      far = far.reshape(*chosen.shape[:3], chosen.shape[3] * c.block)
      beside = begins[..., None] + jnp.arange(c.local * c.block)
      beside = jnp.where(beside <= places[..., None], beside, -1)[:, :, None]
      beside = jnp.broadcast_to(beside, (*chosen.shape[:3], beside.shape[-1]))
      indices = jnp.concatenate([far, beside], axis=-1).astype(jnp.int32)
      arrays = query, pairs.key, pairs.value, indices
      return attend_groups_sharded(*arrays, rules, scale=c.head_dim**-0.5)

    pieces = (query, *choice[:1], *choice[2:])
    if length <= CHUNK:
      return attend(pieces)
    chunks = tuple(cut(x, CHUNK, -1) for x in pieces)
    return joined(jax.lax.map(jax.checkpoint(attend), chunks), length)

  def flat(self, key: jax.Array, value: jax.Array) -> jax.Array:
    """Puts keys and values of all groups side by side, [B, S, W]."""
    both = jnp.concatenate([key, value], axis=-1)
    return both.reshape(*both.shape[:-2], -1)

  def apart(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of `flat`: keys [B, …, G, K] and values [B, …, G, V]."""
    c = self.config
    both = rows.reshape(*rows.shape[:-1], c.kv_heads, c.head_dim + c.values)
    return both[..., : c.head_dim], both[..., c.head_dim :]
