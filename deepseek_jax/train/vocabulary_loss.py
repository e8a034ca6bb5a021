"""The vocabulary losses on a mesh: where devices share a row, each takes its own tokens.

Left to itself, the compiler would run the loop over chunks of a row on all devices that share it,
one device's tokens after the other's.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.layers.context import Context
from deepseek_jax.ops.losses import chunked_choice, chunked_cross_entropy


def cross_entropy(
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  chunk: int,
  context: Context,
) -> jax.Array:
  """Returns what `chunked_cross_entropy` does: the weighted sum [] float32 of nats.

  Args:
    hidden: [B, T, D].
    head: [D, V].
    targets: [B, T] int32.
    weights: [B, T] float32.
    chunk: positions of each row, on each device, whose logits exist at once.
    context: facts about the tokens.
  """

  def loss(hidden, head, targets, weights):
    return chunked_cross_entropy(hidden, head, targets, weights, chunk)[None]

  outs = PartitionSpec((*context.row_axes, *context.sequence_axes) or None)
  # Summed out here: the gradient of a sum inside would be summed over the devices once more.
  return jnp.sum(_on_own_tokens(loss, outs, context)(hidden, head, targets, weights))


def choice(
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  chunk: int,
  context: Context,
) -> tuple[jax.Array, jax.Array]:
  """Returns what `chunked_choice` does: the sum [], and the likeliest tokens [B, T] int32.

  Args:
    hidden: [B, T, D].
    head: [D, V].
    targets: [B, T] int32.
    weights: [B, T] float32.
    chunk: positions of each row, on each device, whose logits exist at once.
    context: facts about the tokens.
  """

  def choose(hidden, head, targets, weights):
    total, chosen = chunked_choice(hidden, head, targets, weights, chunk)
    return total[None], chosen

  rows, axes = context.row_axes, context.sequence_axes
  outs = PartitionSpec((*rows, *axes) or None), PartitionSpec(rows or None, axes or None)
  total, chosen = _on_own_tokens(choose, outs, context)(hidden, head, targets, weights)
  return jnp.sum(total), chosen


def _on_own_tokens(function: Callable[..., Any], outs: Any, context: Context) -> Any:
  """Maps a function of hidden states, head, targets and weights over the devices of a row."""
  rows, axes = context.row_axes, context.sequence_axes
  if not axes:
    return function
  # Rows too: the compiler cannot partition the choice of the targets' logits for rows and
  # vocabulary at once where a third axis is dealt with.
  tokens = PartitionSpec(rows or None, axes)
  return jax.shard_map(
    function,
    in_specs=(tokens, PartitionSpec(), tokens, tokens),
    out_specs=outs,
    axis_names={*rows, *axes},
    check_vma=False,
  )
