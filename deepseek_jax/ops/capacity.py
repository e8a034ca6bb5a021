"""Experts with limited room: who gets in, and who is turned away."""

import jax
import jax.numpy as jnp

from deepseek_jax.ops.expert_rows import sort_by_expert


def place_in_line(experts: jax.Array, count: int) -> jax.Array:
  """Counts how many choices of the same expert come before each choice.

  All first choices come before any second one, and so on; among equals, tokens come in order.

  Args:
    experts: [N, K] int32, from 0 to `count`, which is nobody.
    count: number of experts E.

  Returns:
    [N, K] int32, from 0; it means nothing where the choice is nobody.

  Source: GShard, arXiv 2006.16668, algorithm 1: tokens' first experts fill up, then their second.
  """
  tokens, top_k = experts.shape
  by_rank = experts.T.reshape(-1, 1)
  layout = sort_by_expert(by_rank, count)
  starts = jnp.cumsum(layout.sizes) - layout.sizes
  place = layout.row - jnp.take(starts, by_rank, mode='clip')
  return place.reshape(top_k, tokens).T


def limit_load(experts: jax.Array, count: int, room: int) -> jax.Array:
  """Turns away the choices of an expert beyond its `room`.

  Args:
    experts: [N, K] int32, from 0 to `count`, which is nobody.
    count: number of experts E.
    room: choices that one expert takes.

  Returns:
    [N, K] int32: `experts`, with nobody in the place of choices that found no room.
  """
  return jnp.where(place_in_line(experts, count) < room, experts, count)
