"""Turns the tokens of each block into one entry, also where they come one after the other."""

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from deepseek_jax.layers.attention import ring
from deepseek_jax.layers.attention.rope import RoPE
from deepseek_jax.layers.attention.spread import Whole, over_sequence
from deepseek_jax.layers.attention.stored import Stored
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.weights import vector, weight
from deepseek_jax.ops.attention.compressed import Keys, compress
from deepseek_jax.ops.attention.neighbours import with_tokens_before
from deepseek_jax.ops.attention.ring import Facts


@struct.dataclass
class Compressed:
  """Entries so far, and the last tokens: those of a block that is not full, and of one before it.

  Attributes:
    entries: [B, N, C] in the compute dtype; slot i holds entry i.
    values: [B, P, C or 2C] float32 what of each token is pooled, a ring.
    gates: like `values`, the logits of the weights.
  """

  entries: jax.Array
  values: jax.Array
  gates: jax.Array


COMPRESSED_AXES = Compressed(
  entries=('batch', 'cache_length', None),  # type: ignore[arg-type]
  values=('batch', None, None),  # type: ignore[arg-type]
  gates=('batch', None, None),  # type: ignore[arg-type]
)


def empty_compressed(
  batch: int,
  length: int,
  dim: int,
  ratio: int,
  blocks: int,
  dtype: jax.typing.DTypeLike,
  spare: int,
) -> Compressed:
  """Returns room for the entries [B, N, C] of `length` tokens, holding nothing.

  Args:
    batch: rows B.
    length: tokens of a row.
    dim: channels C of an entry.
    ratio: tokens of a block.
    blocks: blocks that an entry pools.
    dtype: of the entries.
    spare: tokens that can be taken back.
  """
  slots, width = blocks * ratio - 1 + spare, blocks * dim
  return Compressed(
    entries=jnp.zeros((batch, max(length // ratio, 1), dim), dtype),
    values=jnp.zeros((batch, slots, width), jnp.float32),
    gates=jnp.zeros((batch, slots, width), jnp.float32),
  )


class Compressor(nn.Module):
  """Pools every `ratio` tokens [B, T, D] into an entry of `dim` channels, normed and rotated.

  float32 up to the result: the weights are exponents, and few entries stand for many tokens.

  Attributes:
    dim: channels C of an entry.
    ratio: tokens r of a block.
    blocks: blocks that an entry pools: 1, its own, or 2, with the one before.
    rope_dim: last channels of an entry that are rotated, to the position of its block's first
      token.
    rope: rotary embedding.
    norm: norm of an entry.
    stored: number formats that entries are rounded to, or None.
    role: whether entries are attended to, or tell an indexer which are.

  Source: DeepSeek-V4, arXiv 2606.19348, sections 2.3.1 and 2.3.2.
  """

  dim: int
  ratio: int
  blocks: int
  rope_dim: int
  rope: RoPE
  norm: RMSNorm
  stored: Stored | None = None
  role: Literal['key', 'index'] = 'key'

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context, past: Compressed | None
  ) -> tuple[Keys, Compressed | None]:
    """Returns the entries that the tokens x [B, T, D] may see, and the memory after them."""
    width = self.blocks * self.dim
    values, gates = (self._project(x, name, width) for name in ('value', 'gate'))
    start = np.zeros((self.ratio, width), np.float32)
    bias = vector(self, 'position_bias', start, (None, None))
    gates += bias[context.positions % self.ratio]
    positions, segments = context.positions, context.segments
    pool = functools.partial(compress, ratio=self.ratio, overlap=self.blocks == 2)
    earlier = self.blocks * self.ratio - 1
    if past is None:
      facts = Facts(positions, segments)
      entries = pool_spread(pool, (values, gates), facts, earlier, context)
      return entries._replace(rows=self._finish(entries).astype(x.dtype)), None
    old_values, before = ring.before(past.values, positions, earlier)
    old_gates, _ = ring.before(past.gates, positions, earlier)
    made = pool(
      jnp.concatenate([old_values, values], axis=1),
      jnp.concatenate([old_gates, gates], axis=1),
      jnp.concatenate([before, positions], axis=1),
      jnp.concatenate([(before >= 0).astype(jnp.int32), segments], axis=1),
      first=earlier,
    )
    slots = past.entries.shape[1]
    place = jnp.where(made.positions < 0, slots, made.positions // self.ratio)
    batch = jnp.arange(x.shape[0])[:, None]
    rows = self._finish(made).astype(past.entries.dtype)
    after = Compressed(
      entries=past.entries.at[batch, place].set(rows, mode='drop'),
      values=ring.write(past.values, values, positions, context.real),
      gates=ring.write(past.gates, gates, positions, context.real),
    )
    # Where an entry lies says when it was complete. A query sees none of what is not there yet.
    ends = jnp.broadcast_to((jnp.arange(slots) + 1) * self.ratio - 1, (x.shape[0], slots))
    return Keys(after.entries.astype(x.dtype), ends, jnp.ones_like(ends)), after

  def _project(self, x: jax.Array, name: str, width: int) -> jax.Array:
    w = weight(self, name, (x.shape[-1], width), ('embed', None), dtype=jnp.float32)
    return jnp.einsum('btd,dc->btc', x.astype(jnp.float32), w)

  def _finish(self, entries: Keys) -> jax.Array:
    rows = self.norm.build('norm')(entries.rows)
    rest = self.dim - self.rope_dim
    first = entries.positions - (self.ratio - 1)
    turned = self.rope.rotate(rows[..., rest:], first)
    rows = rows[..., :rest]
    if self.stored is not None and self.role == 'key':
      rows = self.stored.round_key(rows)
    rows = jnp.concatenate([rows, turned], axis=-1)
    if self.stored is not None and self.role == 'index':
      rows = self.stored.round_index(rows)
    return rows


def pool_spread(
  pool: Callable[..., Keys],
  tokens: tuple[jax.Array, jax.Array],
  facts: Facts,
  earlier: int,
  context: Context,
) -> Keys:
  """Pools the blocks that end on each device, to which the tokens come that these begin with.

  Args:
    pool: `compress` of values, gates, positions and segments.
    tokens: values and gates [B, T, C or 2C].
    facts: of the tokens.
    earlier: tokens before its last that an entry may be made of.
    context: says how devices share the row.

  Returns:
    Entries [B, N, C] of all devices, one after the other.
  """
  axes = context.sequence_axes
  if not axes:
    return pool(*tokens, *facts)

  def own(tokens, facts, whole):
    del whole
    tokens, facts = with_tokens_before(tokens, facts, earlier, axes)
    return pool(*tokens, *facts, first=earlier)

  return over_sequence(own, context, axes)(tokens, facts, Whole())
