"""How attention is cut into blocks, and which blocks of keys each block of queries looks at."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.attention.pieces import padded
from deepseek_jax.ops.attention.reference import MASKED, Seen

Window = tuple[int, int]
"""(size, n): the last `size` positions up to the query's own, and the positions below n."""


FLOOR = MASKED / 2
"""Highest score of a query before it has seen a key: far above what hidden pairs score, so that
their weights are zero even where all of a query's pairs are hidden."""


class Static(NamedTuple):
  """What is known when attention is compiled, beside shapes.

  Attributes:
    scale: factor on the scores.
    window: what of the past is seen, or None for all.
    in_order: whether key s is the token of query s, and no query sees a later one.
  """

  scale: float
  window: Window | None
  in_order: bool


class Extras(NamedTuple):
  """Numbers that join the scores, and may be learned.

  Attributes:
    key_bias: [B, S] float32 added to every score of a key, or None.
    sinks: [H] float32 logit of each head without a value, or None.
  """

  key_bias: jax.Array | None = None
  sinks: jax.Array | None = None


class Back(NamedTuple):
  """What the gradient starts from.

  Attributes:
    log_sum: [B, T, H] float32 logarithm of each softmax's sum, from the forward pass.
    drift: [B, T, H] float32 Σ_s weight_s · ∂loss/∂weight_s: what the softmax subtracts.
    grad: [B, T, H, V] gradient of the outputs.
  """

  log_sum: jax.Array
  drift: jax.Array
  grad: jax.Array


class Layout(NamedTuple):
  """How arrays are cut into steps and blocks; query head h has the keys of head h // share.

  Attributes:
    row_steps: steps that the rows of the batch are cut into.
    rows: rows B of one step.
    group_steps: steps that the key heads are cut into.
    groups: key heads G of one step.
    share: query heads to a key head.
    query_blocks: blocks I of queries.
    queries: queries of a block.
    key_blocks: blocks J of keys.
    keys: keys of a block.
  """

  row_steps: int
  rows: int
  group_steps: int
  groups: int
  share: int
  query_blocks: int
  queries: int
  key_blocks: int
  keys: int

  @property
  def steps(self) -> int:
    """Steps of rows times steps of key heads; those of the heads run faster."""
    return self.row_steps * self.group_steps


def block_length(length: int, most: int) -> int:
  """Returns the size of a block: as even a share as can be, at most `most`; a short row is one."""
  if length <= most:
    return length
  count = -(-length // most)
  return -(-length // (count * 8)) * 8


def plan_layout(query: jax.Array, key: jax.Array, side: int, cells: int | None) -> Layout:
  """Cuts queries [B, T, H, K] and keys [B, S, G, K].

  Args:
    query: gives the sizes.
    key: gives the sizes.
    side: most rows of the scores of one head and block, query heads that share keys counted
      together; and most keys of a block.
    cells: scores of one step that are held at once; None takes all rows and heads together, which
      is what a compiler needs that is to spread them over a mesh.
  """
  (batch, length, heads, _), (_, keys, groups, _) = query.shape, key.shape
  share = heads // groups
  queries = block_length(length, max(side // share, 16))
  columns = block_length(keys, side)
  fit = batch * groups if cells is None else max(cells // (share * queries * columns), 1)
  together = _divisor(groups, fit)
  rows = _divisor(batch, fit // groups)
  return Layout(
    row_steps=batch // rows,
    rows=rows,
    group_steps=groups // together,
    groups=together,
    share=share,
    query_blocks=-(-length // queries),
    queries=queries,
    key_blocks=-(-keys // columns),
    keys=columns,
  )


def _divisor(total: int, most: int) -> int:
  """Returns the largest divisor of `total` that is at most `most`; at least 1."""
  return max(n for n in range(1, total + 1) if total % n == 0 and n <= max(most, 1))


def cut_queries(x: jax.Array, c: Layout) -> jax.Array:
  """Cuts [B, T, H, K] to [steps, I, rows, groups, share · queries, K]."""
  x = padded(x, c.query_blocks * c.queries)
  x = x.reshape(
    c.row_steps, c.rows, c.query_blocks, c.queries, c.group_steps, c.groups, c.share, -1
  )
  x = x.transpose(0, 4, 2, 1, 5, 6, 3, 7)
  return x.reshape(c.steps, c.query_blocks, c.rows, c.groups, c.share * c.queries, -1)


def join_queries(x: jax.Array, c: Layout, length: int) -> jax.Array:
  """The inverse of `cut_queries`, giving [B, T, H, K]."""
  shape = (c.row_steps, c.group_steps, c.query_blocks, c.rows, c.groups, c.share, c.queries, -1)
  x = x.reshape(shape).transpose(0, 3, 2, 6, 1, 4, 5, 7)
  heads = c.group_steps * c.groups * c.share
  return x.reshape(c.row_steps * c.rows, c.query_blocks * c.queries, heads, -1)[:, :length]


def cut_keys(x: jax.Array, c: Layout) -> jax.Array:
  """Cuts [B, S, G, K] to [steps, J, rows, groups, keys, K]."""
  x = padded(x, c.key_blocks * c.keys)
  x = x.reshape(c.row_steps, c.rows, c.key_blocks, c.keys, c.group_steps, c.groups, -1)
  x = x.transpose(0, 4, 2, 1, 5, 3, 6)
  return x.reshape(c.steps, c.key_blocks, c.rows, c.groups, c.keys, -1)


def join_keys(x: jax.Array, c: Layout, length: int) -> jax.Array:
  """The inverse of `cut_keys`, giving [B, S, G, K]."""
  shape = (c.row_steps, c.group_steps, c.key_blocks, c.rows, c.groups, c.keys, -1)
  x = x.reshape(shape).transpose(0, 3, 2, 5, 1, 4, 6)
  groups = c.group_steps * c.groups
  return x.reshape(c.row_steps * c.rows, c.key_blocks * c.keys, groups, -1)[:, :length]


def cut_facts(x: jax.Array, count: int, c: Layout) -> jax.Array:
  """Cuts [B, T] to [row steps, blocks, rows, T of a block]."""
  return x.reshape(c.row_steps, c.rows, count, -1).transpose(0, 2, 1, 3)


class Visits(NamedTuple):
  """The key blocks that each block of queries visits, for each step of rows P.

  Attributes:
    order: [P, I, J] int32 key blocks: first those that every query of the block sees whole, then
      those that some query may see a part of, then the rest.
    whole: [P, I] int32 how many are of the first sort.
    touched: [P, I] int32 how many are of the first two.
  """

  order: jax.Array
  whole: jax.Array
  touched: jax.Array


class Plan(NamedTuple):
  """What the blocks need to know beside the arrays that are multiplied.

  Attributes:
    seen: positions and segments, cut: queries [P, I, rows, queries], keys [P, J, rows, keys].
    key_bias: [P, J, rows, keys] float32, or None.
    visits: which blocks meet.
    window: what of the past is seen, or None for all.
  """

  seen: Seen
  key_bias: jax.Array | None
  visits: Visits
  window: Window | None

  def mask(self, step: jax.Array, i: jax.Array, j: jax.Array, c: Layout) -> jax.Array:
    """Returns what is added to the scores of a block [rows, 1, share · queries, keys] float32."""
    q, k, q_segments, k_segments = self.seen.map(
      lambda x: pick(x, step, i), lambda x: pick(x, step, j)
    )
    q, k = q[:, :, None], k[:, None, :]
    seen = (k <= q) & (k >= 0)
    if q_segments is not None and k_segments is not None:
      seen &= q_segments[:, :, None] == k_segments[:, None, :]
    if self.window is not None:
      size, sinks = self.window
      seen &= (q - k < size) | (k < sinks)
    hidden = jnp.where(seen, jnp.float32(0), jnp.float32(MASKED))
    return jnp.tile(hidden, (1, c.share, 1))[:, None]


def pick(x: jax.Array, *index: jax.Array) -> jax.Array:
  """Returns the block [rows, …] that leading axes of `x` have at `index`."""
  rest = x.shape[len(index) :]
  starts = [*index, *(jnp.int32(0) for _ in rest)]
  return lax.dynamic_slice(x, starts, (*(1,) * len(index), *rest)).reshape(rest)


def make_plan(
  seen: Seen, key_bias: jax.Array | None, window: Window | None, in_order: bool, c: Layout
) -> Plan:
  """Pads and cuts the facts, and compares every block of queries with every block of keys.

  Args:
    seen: who sees whom, [B, T] and [B, S].
    key_bias: [B, S] added to the scores of a key, or None.
    window: what of the past is seen, or None for all.
    in_order: whether key s is the token of query s, and no query sees a later one.
    c: how arrays are cut.
  """
  # What is added sees nothing and shows nothing.
  lengths = c.query_blocks * c.queries, c.key_blocks * c.keys
  if seen.query_segments is None or seen.key_segments is None:
    seen = Seen(seen.query_positions, seen.key_positions)
  cut = seen.map(
    lambda x: cut_facts(padded(x, lengths[0], -1), c.query_blocks, c),
    lambda x: cut_facts(padded(x, lengths[1], -1), c.key_blocks, c),
  )
  if key_bias is not None:
    key_bias = cut_facts(padded(key_bias.astype(jnp.float32), lengths[1]), c.key_blocks, c)
  return Plan(cut, key_bias, plan_visits(cut, window, in_order, c), window)


def plan_visits(seen: Seen, window: Window | None, in_order: bool, c: Layout) -> Visits:
  """Compares the ranges of positions and segments of each pair of blocks.

  A block is left out only where no query can see a key of it; where documents are packed, some are
  visited in vain.

  Args:
    seen: facts that are cut: [P, I, rows, queries] and [P, J, rows, keys].
    window: what of the past is seen, or None for all.
    in_order: see `make_plan`.
    c: how arrays are cut.
  """
  (q_low, q_first, q_high) = (x[:, :, None] for x in _ranges(seen.query_positions))
  (k_low, k_first, k_high) = (x[:, None] for x in _ranges(seen.key_positions))
  whole = (k_high <= q_low) & (k_low >= 0)
  touched = (k_first <= q_high) & (k_high >= 0)
  if window is not None:
    size, sinks = window
    whole &= (q_high - k_low < size) | (k_high < sinks)
    touched &= (q_first - k_high < size) | (k_first < sinks)
  if seen.query_segments is not None and seen.key_segments is not None:
    (q_low, _, q_high) = (x[:, :, None] for x in _ranges(seen.query_segments))
    (k_low, _, k_high) = (x[:, None] for x in _ranges(seen.key_segments))
    whole &= (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    touched &= (q_low <= k_high) & (k_low <= q_high)
  if in_order:
    last = jnp.arange(1, c.query_blocks + 1) * c.queries - 1
    touched &= (jnp.arange(c.key_blocks) * c.keys <= last[:, None])[None, :, :, None]
  touched, whole = jnp.any(touched, axis=-1), jnp.all(whole & touched, axis=-1)
  order = jnp.argsort(2 - whole.astype(jnp.int32) - touched.astype(jnp.int32), axis=-1)
  count = lambda x: jnp.sum(x, axis=-1, dtype=jnp.int32)  # noqa: E731
  return Visits(order.astype(jnp.int32), count(whole), count(touched))


def _ranges(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns lowest, lowest that is not negative, and highest of each block [P, I, rows]."""
  real = jnp.where(x >= 0, x, jnp.iinfo(jnp.int32).max)
  return jnp.min(x, axis=-1), jnp.min(real, axis=-1), jnp.max(x, axis=-1)
