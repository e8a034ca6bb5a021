"""Blocks of neighbouring queries that share keys: some chosen from afar, and all that are near.

A block's keys are chosen when it begins, from what lies before its window, by what is known then:
nothing that comes later has a say, so that decoding token by token chooses the same. The window,
the last tokens before the block, and the block itself are always among its keys.

Without a cache the blocks are those of the row, and a packed document that begins within a block
finds all of its past there. With one they are those of the sequence. The two are the same where a
row holds one sequence from its start.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.ops.attention.reference import Seen


def leaders(seen: Seen, block: int, window: int) -> Seen:
  """Returns who sees whom when a block's keys are chosen: its first query, before its window.

  Args:
    seen: of T queries that are the S keys.
    block: queries of a block.
    window: tokens before the block that it sees anyway.

  Returns:
    `seen` of N = ⌈T / block⌉ queries.
  """
  first = seen.at(slice(None, None, block))
  return first._replace(query_positions=first.query_positions - window - 1)


def near(starts: jax.Array, keys: int, block: int, window: int) -> jax.Array:
  """Returns the keys of each block's window and of the block itself.

  Args:
    starts: [..., N] int32 key at which each block begins.
    keys: keys S there are.
    block: queries of a block.
    window: tokens before the block.

  Returns:
    [..., N, window + block] int32, -1 beyond the ends.
  """
  found = starts[..., None] + jnp.arange(-window, block)
  return jnp.where((found >= 0) & (found < keys), found, -1).astype(jnp.int32)


def joined(chosen: jax.Array, starts: jax.Array, keys: int, block: int, window: int) -> jax.Array:
  """Puts what is near beside what was chosen [B, N, n]; `starts` [N] or [B, N], see `near`."""
  beside = near(starts, keys, block, window)
  beside = jnp.broadcast_to(beside, (*chosen.shape[:2], beside.shape[-1]))
  return jnp.concatenate([chosen, beside], axis=-1)


def cached_starts(positions: jax.Array, block: int) -> jax.Array:
  """Returns where the blocks begin that T neighbouring positions may lie in.

  Args:
    positions: [B, T] int32, each row's one after the other.
    block: queries of a block.

  Returns:
    [B, N] int32, N = ⌈(T - 1) / block⌉ + 1.
  """
  count = -(-(positions.shape[1] - 1) // block) + 1
  return (positions[:, :1] // block + jnp.arange(count)) * block


def of_tokens(sets: jax.Array, positions: jax.Array, block: int) -> jax.Array:
  """Gives every token the keys of its block, as far as they do not come after it.

  Args:
    sets: [B, N, m] int32 keys of the blocks that begin at `cached_starts`; a key's number is its
      position.
    positions: [B, T] int32.
    block: queries of a block.

  Returns:
    [B, T, m] int32, -1 is none.
  """
  number = jnp.clip(positions // block - positions[:, :1] // block, 0, sets.shape[1] - 1)
  found = jnp.take_along_axis(sets, number[..., None], axis=1)
  return jnp.where(found <= positions[..., None], found, -1)
