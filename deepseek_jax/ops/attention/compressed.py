"""Attention to a window of tokens and to entries that each stand for a block of older tokens.

A block is `ratio` tokens of one segment, the first at a position that `ratio` divides: blocks are
counted within a packed document, wherever in the row it begins, and a document's last tokens that
fill no block are in no entry. Entry i is complete with the token at position (i + 1) · ratio - 1 of
its segment; that is its own position here, so that a query sees an entry as it would see a token.

Legend beside the usual one: N entries, C channels of a key, which is the value too.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.ops.attention.pieces import cut, joined
from deepseek_jax.ops.attention.reference import MASKED, visible

BLOCK = 64
"""Queries of a block, at least; their scores exist at once."""


class Keys(NamedTuple):
  """Tokens or entries that queries attend to.

  Attributes:
    rows: [B, S, C] keys, which are the values too.
    positions: [B, S] int32 position in the segment, an entry's that of its last token; -1 for none.
    segments: [B, S] int32.
  """

  rows: jax.Array
  positions: jax.Array
  segments: jax.Array


def compress(
  values: jax.Array,
  gates: jax.Array,
  positions: jax.Array,
  segments: jax.Array,
  *,
  ratio: int,
  overlap: bool,
  first: int = 0,
) -> Keys:
  """Pools each block of tokens into one entry, by a softmax over its tokens for every channel.

  Args:
    values: [B, S, C] float32 what is pooled; with `overlap` [B, S, 2C], of which the first half
      goes to the entry of the next block and the second to that of the token's own.
    gates: like `values`: logits of the weights.
    positions: [B, S] int32 position of each token in its segment, rising by 1 from token to token.
    segments: [B, S] int32; 0 and below are in no entry.
    ratio: tokens r of a block.
    overlap: whether an entry pools the block before its own too, if its segment has one.
    first: tokens at the start that only blocks which end after them take part in.

  Returns:
    N = ⌈(S - first) / r⌉ entries, more than can be: rows [B, N, C] float32, neither normalised nor
    rotated. Slots that no block fills have position -1 and segment -1.

  Source: DeepSeek-V4, arXiv 2606.19348, sections 2.3.1 and 2.3.2.
  """
  positions, segments = jnp.asarray(positions), jnp.asarray(segments)
  length = positions.shape[1]
  slot = jnp.arange(length)

  def goes_back(tokens: int) -> jax.Array:
    """[B, S] bool: whether the `tokens` tokens up to this one are of one run of its segment."""
    back = jnp.maximum(slot - tokens + 1, 0)
    same = (segments[:, back] == segments) & (positions[:, back] == positions - tokens + 1)
    return same & (slot >= tokens - 1) & (segments > 0)

  ends = (positions % ratio == ratio - 1) & goes_back(ratio) & (slot >= first)
  count = max(-(-(length - first) // ratio), 1)
  number = jnp.where(ends, jnp.cumsum(ends, axis=1) - 1, count)
  rows = jnp.arange(positions.shape[0])[:, None]
  last = jnp.full((positions.shape[0], count), -1, jnp.int32)
  last = last.at[rows, number].set(slot.astype(jnp.int32), mode='drop')
  made, last = last >= 0, jnp.maximum(last, 0)
  pick = lambda x, at: jax.vmap(lambda row, i: row[i])(x, at)  # noqa: E731
  own = jnp.maximum(last[:, :, None] + jnp.arange(1 - ratio, 1), 0)
  half = values.shape[-1] // 2 if overlap else 0
  pooled, logits = pick(values[..., half:], own), pick(gates[..., half:], own)
  if overlap:
    before = jnp.maximum(own - ratio, 0)
    there = pick(goes_back(2 * ratio), last)[:, :, None, None]
    old = jnp.where(there, pick(gates[..., :half], before), MASKED)
    pooled = jnp.concatenate([pick(values[..., :half], before), pooled], axis=2)
    logits = jnp.concatenate([old, logits], axis=2)
  weights = jax.nn.softmax(logits, axis=2)
  return Keys(
    rows=jnp.sum(weights * pooled, axis=2),
    positions=jnp.where(made, pick(positions, last), -1),
    segments=jnp.where(made, pick(segments, last), -1),
  )


def window_slots(positions: jax.Array, segments: jax.Array, tokens: Keys, window: int) -> jax.Array:
  """Returns the slots of the tokens that each query sees in its window, [B, T, W] int32; -1: none.

  Args:
    positions: [B, T] int32 of the queries.
    segments: [B, T] int32 of the queries.
    tokens: the row's own T tokens, after P earlier ones.
    window: positions W in the window, the query's own among them.
  """
  length = positions.shape[1]
  earlier = tokens.positions.shape[1] - length
  slots = earlier + jnp.arange(length)[:, None] - jnp.arange(window)[::-1]
  own = jnp.maximum(slots, 0)
  at, of = tokens.positions[:, own], tokens.segments[:, own]
  here, whose = positions[:, :, None], segments[:, :, None]
  near = (at <= here) & (here - at < window) & (at >= 0)
  return jnp.where((slots >= 0) & (of == whose) & near, own, -1).astype(jnp.int32)


def attend_compressed(
  query: jax.Array,
  positions: jax.Array,
  segments: jax.Array,
  tokens: Keys,
  entries: Keys | None,
  *,
  window: int,
  sinks: jax.Array,
) -> jax.Array:
  """Softmax attention to the last tokens and to all older entries, under one sum with a sink.

  Runs block by block of queries, and again for the gradient: what exists at once are the scores of
  one block against its window and the entries. Costs T · window and T · N.

  Args:
    query: [B, T, H, C].
    positions: [B, T] int32 of the queries.
    segments: [B, T] int32 of the queries.
    tokens: the row's own T tokens, after P earlier ones.
    entries: what a query sees of the past, or None for the window alone.
    window: positions in the window, the query's own among them; P may not be more.
    sinks: [H] float32 logit of each head that takes part in the softmax without a value.

  Returns:
    [B, T, H, C] in the dtype of `query`; scores and softmax are float32, scaled by C^-½.

  Source: DeepSeek-V4, arXiv 2606.19348, section 2.3.3.
  """
  length, earlier = query.shape[1], tokens.rows.shape[1] - query.shape[1]
  size = max(BLOCK, window)
  sinks = sinks.astype(jnp.float32)
  if length <= size:
    own = (query, positions, segments, tokens)
    return jax.checkpoint(_attend_block, static_argnums=(3,))(own, entries, sinks, window)
  count = -(-length // size)
  # A block sees itself and the block before: as many tokens as a window reaches, or more.
  lead = [(size - earlier, fill) for fill in (0, -1, -1)]
  pairs = Keys(*(_pairs(x, size, count, *how) for x, how in zip(tokens, lead, strict=True)))
  blocks = (cut(query, size), cut(positions, size, -1), cut(segments, size, -2), pairs)

  @jax.checkpoint
  def block(own):
    return _attend_block(own, entries, sinks, window)

  return joined(jax.lax.map(block, blocks), length)


def _attend_block(own, entries: Keys | None, sinks: jax.Array, window: int) -> jax.Array:
  """Attends from the queries of one block [B, Q, H, C]."""
  query, positions, segments, tokens = own
  scale = query.shape[-1] ** -0.5
  near = _product('bthc,bsc->bths', query, tokens.rows) * scale
  mask = visible(positions, tokens.positions, segments, tokens.segments)
  mask &= positions[:, :, None] - tokens.positions[:, None] < window
  scores, masks = [near], [mask]
  if entries is not None:
    masks.append(visible(positions, entries.positions, segments, entries.segments))
    scores.append(_product('bthc,bnc->bthn', query, entries.rows) * scale)
  with jax.named_scope('attend'):
    score = jnp.concatenate(scores, axis=-1)
    mask = jnp.concatenate(masks, axis=-1)[:, :, None]
    score = jnp.where(mask, score, MASKED)
    # The sink counts in the maximum: alone with masked keys it must not overflow.
    top = jnp.maximum(jnp.max(score, axis=-1), sinks)
    weights = jnp.where(mask, jnp.exp(score - top[..., None]), 0.0)
    total = jnp.sum(weights, axis=-1) + jnp.exp(sinks - top)
    weights = (weights / total[..., None]).astype(query.dtype)
    out = _product('bths,bsc->bthc', weights[..., : near.shape[-1]], tokens.rows)
    if entries is not None:
      out += _product('bthn,bnc->bthc', weights[..., near.shape[-1] :], entries.rows)
  return out.astype(query.dtype)


def _pairs(x: jax.Array, size: int, count: int, lead: int, fill: int) -> jax.Array:
  """[B, P + T, …] -> [blocks, B, 2 · size, …]: each block after the one before it."""
  widths = [(0, 0)] * x.ndim
  widths[1] = (lead, 0)
  blocks = cut(jnp.pad(x, widths, constant_values=fill), size, fill, count + 1)
  return jnp.concatenate([blocks[:-1], blocks[1:]], axis=2)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
