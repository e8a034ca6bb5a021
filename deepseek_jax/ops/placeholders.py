"""From placeholders in a row of tokens to where in the text each medium is."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

LATE = 2**30
"""A position that no token has."""


class Places(NamedTuple):
  """Where in its row the medium of each embedding is; the same for all embeddings of a medium.

  Attributes:
    first: [B, S] int32 position of its first placeholder.
    last: [B, S] int32 position of its last placeholder.
    segments: [B, S] int32 packed document that it is in; 0 where it has no placeholder.
    numbers: [B, S] int32 which of the row's media it is, from 1.
  """

  first: jax.Array
  last: jax.Array
  segments: jax.Array
  numbers: jax.Array


def media_places(
  placeholders: jax.Array,
  positions: jax.Array,
  segments: jax.Array,
  spans: Sequence[tuple[int, int]],
) -> Places:
  """Finds the places of the media of each row.

  Args:
    placeholders: [B, T] int32 which embedding stands at each token; negative is none.
    positions: [B, T] int32 of the tokens.
    segments: [B, T] int32 of the tokens.
    spans: (media, embeddings of each) for each kind of media, in order.
  """
  total = sum(media * slots for media, slots in spans)

  def row(numbers, positions, segments):
    place = jnp.where(numbers >= 0, numbers, total)
    return (
      jnp.full(total, LATE, jnp.int32).at[place].min(positions, mode='drop'),
      jnp.full(total, -1, jnp.int32).at[place].max(positions, mode='drop'),
      jnp.zeros(total, jnp.int32).at[place].max(segments, mode='drop'),
    )

  found = jax.vmap(row)(placeholders, positions, segments)
  reduces = (jnp.min, jnp.max, jnp.max)
  parts: list[list[jax.Array]] = [[], [], [], []]
  start, number = 0, 1
  for media, slots in spans:
    size = (placeholders.shape[0], media, slots)
    for values, reduce, out in zip(found, reduces, parts):
      own = values[:, start : start + media * slots].reshape(size)
      whole = jnp.broadcast_to(reduce(own, axis=-1, keepdims=True), size)
      out.append(whole.reshape(size[0], -1))
    each = jnp.repeat(jnp.arange(number, number + media, dtype=jnp.int32), slots)
    parts[3].append(jnp.broadcast_to(each, (size[0], media * slots)))
    start, number = start + media * slots, number + media
  return Places(*(jnp.concatenate(part, axis=1) for part in parts))
