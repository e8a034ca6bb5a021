"""Spans of neighbouring tokens that are compared, or attended to, as one.

A span is `length` tokens of one segment; its first has a position that `stride` divides. Where rows
are packed, spans are counted within each document, wherever in the row it begins, and a document's
last tokens may be in no span. A query sees a span as it would see the span's last token.

Legend beside the usual one: N spans of a row, M blocks of a row that may be chosen, G key heads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.attention.pieces import cut, joined
from deepseek_jax.ops.attention.reference import MASKED, Seen, visible
from deepseek_jax.ops.attention.select import take_largest

BLOCK = 64
"""Queries whose scores exist at once."""


class Spans(NamedTuple):
  """Where spans end.

  Attributes:
    last: [B, N] int32 place in the row of the last token; 0 where there is no span.
    positions: [B, N] int32 its position in its segment; -1 where there is no span.
    segments: [B, N] int32; -1 where there is no span.
  """

  last: jax.Array
  positions: jax.Array
  segments: jax.Array

  def tokens(self, length: int) -> jax.Array:
    """Returns the places of a span's tokens, [B, N, length] int32; -1 where there is no span."""
    found = self.last[:, :, None] + jnp.arange(1 - length, 1)
    return jnp.where(self.positions[:, :, None] >= 0, found, -1)


def find_spans(
  positions: jax.Array, segments: jax.Array, length: int, stride: int, first: int = 0
) -> Spans:
  """Finds the spans of packed rows.

  Args:
    positions: [B, S] int32 position of each token in its segment, rising by 1 from token to token.
    segments: [B, S] int32; 0 and below are in no span.
    length: tokens of a span.
    stride: tokens between the beginnings of two.
    first: place of the first token that may end a span.

  Returns:
    As many as there can be, in the order of the row.
  """
  positions, segments = jnp.asarray(positions), jnp.asarray(segments)
  places = jnp.arange(positions.shape[1])
  back = jnp.maximum(places - length + 1, 0)
  whole = (positions[:, back] == positions - length + 1) & (segments[:, back] == segments)
  ends = whole & (places >= max(length - 1, first)) & (segments > 0)
  ends &= (positions - length + 1) % stride == 0
  count = max((positions.shape[1] - max(length - 1, first) - 1) // stride + 1, 1)
  number = jnp.where(ends, jnp.cumsum(ends, axis=1) - 1, count)
  rows = jnp.arange(positions.shape[0])[:, None]
  last = jnp.full((positions.shape[0], count), -1, jnp.int32)
  last = last.at[rows, number].set(places.astype(jnp.int32), mode='drop')
  made, last = last >= 0, jnp.maximum(last, 0)
  take = lambda x: jnp.where(made, jnp.take_along_axis(x, last, axis=1), -1)  # noqa: E731
  return Spans(last, take(positions), take(segments))


def overlaps(spans: Spans, length: int, blocks: Spans, block: int, keys: int) -> jax.Array:
  """Counts the tokens that spans and blocks have in common.

  Args:
    spans: N of them.
    length: tokens of a span.
    blocks: M of them, of which no two have a token in common.
    block: tokens of a block.
    keys: tokens S of a row.

  Returns:
    [B, N, M] float32.
  """
  rows = jnp.arange(spans.last.shape[0])
  count = blocks.last.shape[1]
  inside = blocks.tokens(block)
  numbers = jnp.broadcast_to(jnp.arange(count)[:, None], inside.shape[1:])
  owner = jnp.full((len(rows), keys), count, jnp.int32)
  owner = owner.at[rows[:, None, None], jnp.where(inside < 0, keys, inside)].set(
    numbers, mode='drop'
  )
  tokens = spans.tokens(length)
  owners = jnp.where(tokens < 0, count, owner[rows[:, None, None], jnp.maximum(tokens, 0)])
  sums = jnp.zeros((len(rows), spans.last.shape[1], count + 1), jnp.float32)
  places = rows[:, None, None], jnp.arange(spans.last.shape[1])[:, None], owners
  return sums.at[places].add(1.0)[..., :count]


def rank_blocks(
  query: jax.Array,
  key: jax.Array,
  seen: Seen,
  shares: jax.Array,
  earlier: Seen,
  first: jax.Array,
  count: int,
  scale: float,
) -> jax.Array:
  """Finds the blocks whose spans get most of each query's attention, exactly.

  All heads that share keys choose together. Looks at all pairs of a query and a span, but only at
  those of a few queries at a time.

  Args:
    query: [B, T, H, K].
    key: [B, N, G, K] keys of the spans; G divides H.
    seen: which spans each query may see.
    shares: [B, N, M] float32 share of a span's attention that goes to each block.
    earlier: which blocks each query may choose.
    first: [B, M] bool, blocks that are chosen before all others.
    count: blocks that a query chooses, or as many as there are.
    scale: factor on the scores.

  Returns:
    [B, T, G, count] int32 blocks, -1 where there are fewer. No gradient flows.

  Source: Yuan et al. (NSA), arXiv 2502.11089, equations 8 to 11.
  """
  query, key, shares = lax.stop_gradient((query, key, shares))
  length, heads, groups = query.shape[1], query.shape[2], key.shape[2]
  size = min(BLOCK, length)
  count = min(count, shares.shape[2])

  def block(piece):
    queries, spans_seen, blocks_seen = piece
    q = queries.reshape(*queries.shape[:2], groups, heads // groups, -1)
    scores = jnp.einsum('btgrk,bngk->bgrtn', q, key, preferred_element_type=jnp.float32) * scale
    mask = visible(spans_seen[0], seen.key_positions, spans_seen[1], seen.key_segments)
    mask = mask[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)
    weights = jnp.sum(jnp.where(mask, weights, 0.0), axis=2)
    worth = jnp.einsum('bgtn,bnm->btgm', weights, shares)
    # No block has more than all the weights of all heads.
    worth += jnp.where(first, heads, 0)[:, None, None]
    mask = visible(blocks_seen[0], earlier.key_positions, blocks_seen[1], earlier.key_segments)
    return take_largest(jnp.where(mask[:, :, None], worth, -jnp.inf), count)

  sides = ((x.query_positions, x.query_segments) for x in (seen, earlier))
  pieces = cut(query, size), *jax.tree.map(lambda x: cut(x, size, -1), tuple(sides))
  with jax.named_scope('select'):
    return joined(lax.map(block, pieces), length)
