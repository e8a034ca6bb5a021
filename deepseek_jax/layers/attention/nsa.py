"""Native sparse attention: compressed tokens, selected blocks and a window, weighed by gates."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.layers.attention import ring
from deepseek_jax.layers.attention.interface import Cache, in_order_only
from deepseek_jax.layers.attention.mha import (
  HEAD_CACHE_AXES,
  HeadAttention,
  HeadCache,
  empty_head_cache,
)
from deepseek_jax.layers.attention.nsa_blocks import Pairs, attend_to_blocks, choose_blocks
from deepseek_jax.layers.attention.rope import RoPE
from deepseek_jax.layers.attention.shards import attend_sharded
from deepseek_jax.layers.attention.spread import Whole, over_sequence, with_all_keys
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.context_parallel import Order
from deepseek_jax.layers.weights import Met, vector, weight
from deepseek_jax.ops.attention.blocks import Window
from deepseek_jax.ops.attention.neighbours import with_tokens_before
from deepseek_jax.ops.attention.reference import Seen
from deepseek_jax.ops.attention.ring import Facts
from deepseek_jax.ops.attention.spans import Spans, find_spans
from deepseek_jax.sharding.rules import Rules


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

  def check_shared(self, tokens: int, order: Order) -> list[str]:
    """Returns what is wrong with such an order of the tokens of a row, as messages."""
    del tokens
    return in_order_only(order, 'the tokens of a span')

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
    axes = None if cache is None else ()

    def to_entries(queries, entries, whole):
      del whole
      return attend_pairs(queries[0], entries, queries[1], context.rules)

    with jax.named_scope('compressed'):
      mixed = gates[0] * with_all_keys(to_entries, (query, own), entries, Whole(), context, axes)
    with jax.named_scope('selected'):
      choice = choose_blocks(c, query, entries, spans, selected, context)
      mixed += gates[1] * attend_to_blocks(c, query, selected, choice, context, axes)
    with jax.named_scope('window'):
      if cache is None:
        near = self.attend_own(query, recent.key, recent.value, context, (c.window, 0))
      else:
        near = attend_pairs(query, recent, own, context.rules, window=(c.window, 0))
      mixed += gates[2] * near
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
      picked, spans = pick_spans(flat, context, c.span, c.stride)
      entries = Pairs(*self.apart(self.pool(picked, spans)), spans.positions, spans.segments)
      return entries, spans, None
    earlier = c.span - 1
    old, before = ring.before(cache.unpooled, context.positions, earlier)
    positions = jnp.concatenate([before, context.positions], axis=1)
    there = jnp.concatenate([before >= 0, context.real], axis=1)
    spans = find_spans(positions, there.astype(jnp.int32), c.span, c.stride, first=earlier)
    picked = tokens_of(spans, jnp.concatenate([old.astype(x.dtype), flat], axis=1), c.span)
    made = self.pool(picked, spans)
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

  def pool(self, picked: jax.Array, spans: Spans) -> jax.Array:
    """Makes an entry [B, N, W] of the tokens [B, N, span, W] of each span."""
    c = self.config
    entries = []
    for name, part in zip(('key', 'value'), self.apart(picked), strict=True):
      dim = part.shape[-1]
      # [B, N, span, G, K]: the same network serves all groups.
      part += vector(self, f'{name}_places', np.zeros((c.span, 1, dim), np.float32), (None,) * 3)
      first = weight(
        self, f'{name}_pool', (c.span, dim, dim), (None,) * 3, dtype=picked.dtype, inputs=2
      )
      second = weight(self, f'{name}_pool_out', (dim, dim), (None, None), dtype=picked.dtype)
      hidden = jax.nn.silu(jnp.einsum('bnsgk,skj->bngj', part.astype(picked.dtype), first))
      entries.append(jnp.einsum('bngj,jk->bngk', hidden, second))
    begins = jnp.maximum(spans.positions - c.span + 1, 0)
    return self.flat(c.rope.rotate(entries[0], begins), entries[1])

  def flat(self, key: jax.Array, value: jax.Array) -> jax.Array:
    """Puts keys and values of all groups side by side, [B, S, W]."""
    both = jnp.concatenate([key, value], axis=-1)
    return both.reshape(*both.shape[:-2], -1)

  def apart(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of `flat`: keys [B, …, G, K] and values [B, …, G, V]."""
    c = self.config
    both = rows.reshape(*rows.shape[:-1], c.kv_heads, c.head_dim + c.values)
    return both[..., : c.head_dim], both[..., c.head_dim :]


def attend_pairs(
  query: jax.Array, pairs: Pairs, own: Any, rules: Rules, window: Window | None = None
) -> jax.Array:
  """Attends from queries [B, T, H, K], of which `own` has positions and segments, to `pairs`."""
  seen, scale = Seen(own[0], pairs.positions, own[1], pairs.segments), query.shape[-1] ** -0.5
  return attend_sharded(query, pairs.key, pairs.value, seen, rules, scale=scale, window=window)


def tokens_of(spans: Spans, tokens: jax.Array, length: int) -> jax.Array:
  """Returns the tokens [B, N, length, W] of each span, from [B, S, W]."""
  return jax.vmap(lambda x, i: x[i])(tokens, jnp.maximum(spans.tokens(length), 0))


def pick_spans(
  tokens: jax.Array, context: Context, length: int, stride: int
) -> tuple[jax.Array, Spans]:
  """Finds the spans of a row and their tokens.

  Where devices share the row, a span is found where it ends, and its first tokens come there.

  Args:
    tokens: [B, T, W].
    context: facts about the tokens.
    length: tokens of a span.
    stride: tokens from one span to the next.

  Returns:
    [B, N, length, W], and where the spans end in the row.
  """
  facts, axes = Facts(context.positions, context.segments), context.sequence_axes
  if not axes:
    spans = find_spans(*facts, length, stride)
    return tokens_of(spans, tokens, length), spans

  def own(tokens, facts, whole):
    del whole
    first = jax.lax.axis_index(axes) * tokens.shape[1] - (length - 1)
    tokens, facts = with_tokens_before(tokens, facts, length - 1, axes)
    spans = find_spans(facts.positions, facts.segments, length, stride, first=length - 1)
    last = jnp.where(spans.positions < 0, 0, spans.last + first)
    return tokens_of(spans, tokens, length), spans._replace(last=last)

  return over_sequence(own, context, axes)(tokens, facts, Whole())
