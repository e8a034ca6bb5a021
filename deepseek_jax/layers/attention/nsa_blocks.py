"""The branch of native sparse attention that chooses blocks of tokens, and attends to them."""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.layers.attention.shards import attend_groups_sharded
from deepseek_jax.layers.attention.spread import Whole, with_all_keys
from deepseek_jax.layers.context import Context
from deepseek_jax.ops.attention.pieces import cut, joined
from deepseek_jax.ops.attention.reference import Seen
from deepseek_jax.ops.attention.spans import Spans, find_spans, overlaps, rank_blocks

if TYPE_CHECKING:
  from deepseek_jax.layers.attention.nsa import NSA

CHUNK = 1024
"""Queries whose keys are named one by one at once: their names alone are 4 · k bytes a query."""


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


def choose_blocks(
  c: 'NSA',
  query: jax.Array,
  entries: Pairs,
  spans: Spans | None,
  selected: Pairs,
  context: Context,
) -> Choice:
  """Chooses blocks for every query and group of heads.

  Args:
    c: the config.
    query: [B, T, H, K].
    entries: by whose attention blocks are chosen.
    spans: where the entries' spans end; None where their slots say it.
    selected: the tokens that blocks consist of.
    context: facts about the T tokens.
  """
  positions, keys = context.positions, selected.key.shape[1]
  batch, length = positions.shape
  axes = None
  if spans is None:
    slots = jnp.broadcast_to(jnp.arange(keys), (batch, keys))
    ones = jnp.ones_like(slots)
    blocks, places, segments = find_spans(slots, ones, c.block, c.block), positions, None
    last = jnp.minimum(entries.positions, keys - 1)
    spans, axes = Spans(last, entries.positions, jnp.ones_like(last)), ()
  else:
    segments = context.segments
    blocks = find_spans(positions, segments, c.block, c.block)
    places = jnp.broadcast_to(jnp.arange(length), positions.shape)
  # The first position of the blocks that are always seen.
  near = positions - positions % c.block - (c.local - 1) * c.block
  shares = overlaps(spans, c.span, blocks, c.block, keys) / c.span
  first = (blocks.positions >= 0) & (blocks.positions < c.initial * c.block)

  def rank(own, keys, whole):
    query, positions, near, segments = own
    key, facts, shares = keys
    blocks, first = whole.tables
    seen = Seen(positions, facts[0], segments, facts[1])
    earlier = Seen(near - 1, blocks[0], segments, None if segments is None else blocks[1])
    count, scale = c.blocks - c.local, c.head_dim**-0.5
    return rank_blocks(query, key, seen, shares, earlier, first, count, scale)

  own = query, positions, near, segments
  facts = entries.key, (entries.positions, entries.segments), shares
  tables = (blocks.positions, blocks.segments), first
  chosen = with_all_keys(rank, own, facts, Whole(tables=tables), context, axes)
  begins = places - (positions - jnp.maximum(near, 0))
  return Choice(chosen, blocks.tokens(c.block), begins, places)


def attend_to_blocks(
  c: 'NSA',
  query: jax.Array,
  pairs: Pairs,
  choice: Choice,
  context: Context,
  axes: tuple[str, ...] | None = None,
) -> jax.Array:
  """Attends from queries [B, T, H, K] to the tokens of their blocks, giving [B, T, H, V].

  Args:
    c: the config.
    query: [B, T, H, K].
    pairs: the tokens.
    choice: of each query.
    context: facts about the T tokens.
    axes: mesh axes that share the row; None takes the context's.
  """

  def attend(piece, pairs, tokens):
    (query, chosen, begins, places), (key, value) = piece, pairs
    far = jax.vmap(lambda x, i: x[i])(tokens, jnp.maximum(chosen, 0))
    far = jnp.where(chosen[..., None] >= 0, far, -1)
    far = far.reshape(*chosen.shape[:3], chosen.shape[3] * c.block)
    beside = begins[..., None] + jnp.arange(c.local * c.block)
    beside = jnp.where(beside <= places[..., None], beside, -1)[:, :, None]
    beside = jnp.broadcast_to(beside, (*chosen.shape[:3], beside.shape[-1]))
    indices = jnp.concatenate([far, beside], axis=-1).astype(jnp.int32)
    arrays = query, key, value, indices
    return attend_groups_sharded(*arrays, context.rules, scale=c.head_dim**-0.5)

  def attend_own(pieces, pairs, whole):
    length, tokens = pieces[0].shape[1], whole.tables
    if length <= CHUNK:
      return attend(pieces, pairs, tokens)
    chunks = tuple(cut(x, CHUNK, -1) for x in pieces)
    one = jax.checkpoint(lambda piece: attend(piece, pairs, tokens))
    return joined(jax.lax.map(one, chunks), length)

  own = query, choice.chosen, choice.begins, choice.places
  keys = pairs.key, pairs.value
  return with_all_keys(attend_own, own, keys, Whole(tables=choice.tokens), context, axes)
