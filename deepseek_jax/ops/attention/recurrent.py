"""A memory of fixed size: slots that pool the tokens before the segment a query stands in.

A document is cut into segments of `size` tokens, counted from its first. Before the boundary at
position b, slot j holds the mean of the latents of all tokens before b, weighed by
exp(logit_tj + fading_j · (position_t - b) / size). Numerator, denominator and the largest exponent
of any tokens can be merged with those of any others, in whatever pieces they come; the exponents
are kept relative to the last boundary, so that they stay as small in long documents as in short
ones: to go on to the next boundary is to take `fading` off the largest one.

Rows are cut into row-blocks of at most `size` tokens. A row-block holds at most one boundary that
has tokens before it: two of one document lie `size` tokens apart, and a document that begins inside
has its own `size` tokens later. So each row-block freezes the memory once, if at all: for its first
document, which the row-block before (or a cache) began. All row-blocks are pooled at once; what
remains for a loop over them is to merge.

Legend beside the usual one: M slots, N row-blocks, n tokens of one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.attention.pieces import cut, joined
from deepseek_jax.ops.attention.reference import MASKED, visible


class Pool(NamedTuple):
  """A softmax-weighted mean of some tokens that more tokens can join; all float32.

  Attributes:
    top: [..., M] largest exponent; `MASKED` where there is no token.
    total: [..., M] sum of weights, relative to `top`.
    mixed: [..., M, C] sum of weighted latents, likewise.
  """

  top: jax.Array
  total: jax.Array
  mixed: jax.Array

  def mean(self) -> tuple[jax.Array, jax.Array]:
    """Returns the mean [..., M, C], zero where no token is, and where there is one [..., M]."""
    there = self.total > 0
    return self.mixed / jnp.where(there, self.total, 1.0)[..., None], there

  def without(self, gone: jax.Array) -> 'Pool':
    """Forgets all tokens of the rows `gone` [...]."""
    gone = gone[..., None]
    return Pool(
      jnp.where(gone, MASKED, self.top),
      jnp.where(gone, 0.0, self.total),
      jnp.where(gone[..., None], 0.0, self.mixed),
    )


def empty_pool(batch: int, slots: int, channels: int) -> Pool:
  """Returns a pool [B, M, C] of no token."""
  return Pool(
    top=jnp.full((batch, slots), MASKED, jnp.float32),
    total=jnp.zeros((batch, slots), jnp.float32),
    mixed=jnp.zeros((batch, slots, channels), jnp.float32),
  )


def pool_tokens(latent: jax.Array, logits: jax.Array, mask: jax.Array) -> Pool:
  """Pools tokens.

  Args:
    latent: [..., T, C] float32.
    logits: [..., T, M] float32 exponents.
    mask: [..., T, M] bool, which tokens take part in which slot.

  Returns:
    Pools [..., M, C].
  """
  logits = jnp.where(mask, logits, MASKED)
  # Any constant would do: it leaves the mean as it is.
  top = lax.stop_gradient(jnp.max(logits, axis=-2))
  weights = jnp.where(mask, jnp.exp(logits - top[..., None, :]), 0.0)
  mixed = jnp.einsum('...tm,...tc->...mc', weights, latent)
  return Pool(top, jnp.sum(weights, axis=-2), mixed)


def merge(a: Pool, b: Pool) -> Pool:
  """Returns the pool [..., M, C] of the tokens of both.

  Source: the running softmax of Milakov and Gimelshein, arXiv 1805.02867, section 3.1.
  """
  top = lax.stop_gradient(jnp.maximum(a.top, b.top))
  first, second = jnp.exp(a.top - top), jnp.exp(b.top - top)
  mixed = a.mixed * first[..., None] + b.mixed * second[..., None]
  return Pool(top, a.total * first + b.total * second, mixed)


class Blocks(NamedTuple):
  """How a row falls into row-blocks; the first document of one is that of its first token.

  Attributes:
    runs: [B, T] int32 number of the run of tokens of one segment of one document, rising along the
      row from 0.
    older: [N, B, n] bool tokens of the first document before its boundary in the row-block, or all
      where there is none.
    newer: [N, B, n] bool tokens of the last document that are in no older segment of it.
    begins: [N, B] bool whether the first document begins with the first token.
    crossed: [N, B] bool whether the last document is the first, and beyond its boundary.
    left: [N, B] bool whether the last document is another than the first.
    boundary: [N, B] int32 position of the boundary; -1 for none.
    boundary_runs: [N, B] int32 run that begins with the boundary; -1 for none.
  """

  runs: jax.Array
  older: jax.Array
  newer: jax.Array
  begins: jax.Array
  crossed: jax.Array
  left: jax.Array
  boundary: jax.Array
  boundary_runs: jax.Array


def find_blocks(positions: jax.Array, segments: jax.Array, size: int) -> Blocks:
  """Cuts rows into row-blocks.

  Args:
    positions: [B, T] int32, rising by 1 within a document. From 0, but for the first document of a
      row, which may have begun before the row.
    segments: [B, T] int32 document of each token; 0 is padding.
    size: tokens of a segment.
  """
  positions, segments = jnp.asarray(positions), jnp.asarray(segments)
  whole, numbers = min(size, positions.shape[1]), positions // size
  differs = (segments[:, 1:] != segments[:, :-1]) | (numbers[:, 1:] != numbers[:, :-1])
  runs = jnp.pad(jnp.cumsum(differs, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
  place, document, number = (cut(x, whole) for x in (positions, segments, numbers))
  real = document > 0
  first = real & (document == document[:, :, :1])
  # The segment that the token before the row-block's first was in; -1 for none.
  old = (place[:, :, :1] - 1) // size
  beyond = first & (number == old + 1)
  last = jnp.max(jnp.where(real, jnp.arange(whole), 0), axis=-1, keepdims=True)
  last_document = jnp.take_along_axis(document, last, axis=-1)
  left = jnp.any(real, axis=-1) & (last_document != document[:, :, :1])[..., 0]
  crosses = jnp.any(beyond, axis=-1)
  return Blocks(
    runs=runs,
    older=first & (number == old),
    newer=jnp.where(left[..., None], real & (document == last_document), beyond),
    begins=first[:, :, 0] & (place[:, :, 0] == 0),
    crossed=crosses & ~left,
    left=left,
    boundary=jnp.where(crosses, (old[..., 0] + 1) * size, -1),
    boundary_runs=jnp.max(jnp.where(beyond, cut(runs, whole), -1), axis=-1),
  )


def pool_rows(
  latent: jax.Array,
  logits: jax.Array,
  mask: jax.Array,
  fading: jax.Array,
  blocks: Blocks,
  before: Pool,
) -> tuple[jax.Array, jax.Array, Pool]:
  """Pools rows of packed documents, O(T · M · C), without a memory for every token.

  Args:
    latent: [B, T, C] what is pooled.
    logits: [B, T, M] float32 exponents, relative to the first position of the token's segment.
    mask: [B, T, M] bool, which tokens take part in which slot.
    fading: [M] float32 what exponents lose from one boundary to the next.
    blocks: from `find_blocks`.
    before: [B, M, C] the tokens before each row of the document that it goes on with, relative to
      the first position of the last one's segment.

  Returns:
    The memory at the boundary in each row-block [N, B, M, C], in the dtype of `latent`; where it
    holds a token [N, B, M]; and the pool [B, M, C] of the last document, for what comes next.
  """
  size = blocks.older.shape[2]
  pieces = cut(latent.astype(jnp.float32), size), cut(logits, size)
  shown = cut(mask, size)
  older, newer = (
    pool_tokens(*pieces, shown & tokens[..., None]) for tokens in (blocks.older, blocks.newer)
  )

  def step(running: Pool, block):
    older, newer, begins, crossed, left = block
    full = merge(running.without(begins), older)
    kept = full.without(left)
    kept = kept._replace(top=kept.top - jnp.where(crossed[:, None], fading, 0.0))
    mean, there = full.mean()
    return merge(kept, newer), (mean.astype(latent.dtype), there)

  facts = older, newer, blocks.begins, blocks.crossed, blocks.left
  running, (mean, there) = lax.scan(step, before, facts)
  return mean, there, running


class Keys(NamedTuple):
  """What queries of a row may attend to: its tokens, and M slots after those of each row-block.

  A query sees the keys of its own run up to its position.

  Attributes:
    latent: [B, S, C] latents of tokens and slots.
    rope_key: [B, S, R] rotated keys; zero for slots: they are nowhere.
    positions: [B, S] int32, a slot's that of its boundary; -1 for none.
    runs: [B, S] int32; see `Blocks`.
    places: [B, S] int32 place in a cache of `size` tokens and M slots.
  """

  latent: jax.Array
  rope_key: jax.Array
  positions: jax.Array
  runs: jax.Array
  places: jax.Array


def join_keys(
  tokens: tuple[jax.Array, jax.Array],
  positions: jax.Array,
  blocks: Blocks,
  memory: tuple[jax.Array, jax.Array],
  size: int,
) -> Keys:
  """Puts the memory of each row-block after its tokens.

  Beside each other, since attention visits keys in neighbouring blocks.

  Args:
    tokens: latents [B, T, C] and rotated keys [B, T, R].
    positions: [B, T] int32.
    blocks: from `find_blocks`.
    memory: [N, B, M, C] and [N, B, M] from `pool_rows`.
    size: tokens of a segment.

  Returns:
    S = N · (n + M) keys.
  """
  (latent, rope_key), (mean, there) = tokens, memory
  whole = blocks.older.shape[2]
  nowhere = jnp.zeros((*there.shape, rope_key.shape[-1]), rope_key.dtype)
  boundary = jnp.where(there, blocks.boundary[..., None], -1)
  runs = jnp.broadcast_to(blocks.boundary_runs[..., None], there.shape)
  slots = jnp.broadcast_to(size + jnp.arange(there.shape[2]), there.shape)
  pairs = (
    (cut(latent, whole), mean),
    (cut(rope_key, whole), nowhere),
    (cut(positions, whole, -1), boundary),
    (cut(blocks.runs, whole, -1), runs),
    (cut(positions % size, whole), slots),
  )
  return Keys(*(joined(jnp.concatenate(pair, axis=2)) for pair in pairs))


def memory_by_definition(
  latent: jax.Array,
  logits: jax.Array,
  mask: jax.Array,
  fading: jax.Array,
  positions: jax.Array,
  segments: jax.Array,
  size: int,
) -> tuple[jax.Array, jax.Array]:
  """Pools, for every query by itself, all tokens before its segment: the slow twin of `pool_rows`.

  Args:
    latent: [B, T, C] float32.
    logits: [B, T, M] float32 scores alone: nothing of a token's position is in them.
    mask: [B, T, M] bool.
    fading: [M] float32.
    positions: [B, T] int32.
    segments: [B, T] int32.
    size: tokens of a segment.

  Returns:
    [B, T, M, C] the memory of each query, and [B, T, M] whether it holds a token.
  """
  begin = positions // size * size
  before = visible(begin - 1, positions, segments, segments) & (segments > 0)[:, None]
  distance = (positions[:, None] - begin[:, :, None]) / size
  exponents = logits[:, None] + fading * distance[..., None].astype(jnp.float32)
  shown = before[..., None] & mask[:, None]
  exponents = jnp.where(shown, exponents, MASKED)
  there = jnp.any(shown, axis=2)
  weights = jnp.where(shown, jax.nn.softmax(exponents, axis=2), 0.0)
  return jnp.einsum('btsm,bsc->btmc', weights, latent), there


def attend_by_definition(
  query: tuple[jax.Array, jax.Array],
  tokens: tuple[jax.Array, jax.Array],
  memory: tuple[jax.Array, jax.Array],
  mask: jax.Array,
  scale: float,
) -> jax.Array:
  """Attends from each query to tokens and to a memory of its own, every score in memory.

  Args:
    query: [B, T, H, C] queries in the latent space, and rotated ones [B, T, H, R].
    tokens: latents [B, S, C] and rotated keys [B, S, R].
    memory: from `memory_by_definition`.
    mask: [B, T, S] bool, tokens that each query sees.
    scale: factor on the scores.

  Returns:
    [B, T, H, C] mixed latents.
  """
  near = jnp.einsum('bthc,bsc->bths', query[0], tokens[0])
  near += jnp.einsum('bthr,bsr->bths', query[1], tokens[1])
  far = jnp.einsum('bthc,btmc->bthm', query[0], memory[0])
  seen = jnp.concatenate([mask, memory[1]], axis=-1)[:, :, None]
  scores = jnp.concatenate([near, far], axis=-1) * scale
  weights = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1)
  mixed = jnp.einsum('bths,bsc->bthc', weights[..., : mask.shape[2]], tokens[0])
  return mixed + jnp.einsum('bthm,btmc->bthc', weights[..., mask.shape[2] :], memory[0])
