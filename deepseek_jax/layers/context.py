"""What every layer may need to know about the tokens it is given."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec

from deepseek_jax.layers.context_parallel import (
  ContextParallel,
  Partitioned,
  Ring,
  arrange,
  restore,
)
from deepseek_jax.ops.attention.reference import Seen
from deepseek_jax.sharding.rules import Rules, shard_count

MODALITIES = ('text', 'image', 'video', 'sound', 'points')
TEXT, IMAGE, VIDEO, SOUND, POINTS = range(len(MODALITIES))
"""What a token of a row is: values of `Context.modality`."""

MEDIA = {
  'image': IMAGE,
  'tile': IMAGE,
  'video': VIDEO,
  'sound': SOUND,
  'points': POINTS,
  'passage': TEXT,
}
"""Kinds of media that a row may hold, and what their tokens are. Their order here is that of their
embeddings in a row. A tile is a part of a picture, seen closer; a passage is text of another stream
than the row's."""

NEWLINE, SEPARATOR = -2, -3
"""Values of `Context.placeholders`: the learned vectors that stand at the end of a row of patches,
and between a whole picture and its tiles."""


@struct.dataclass
class Media:
  """The media of one kind in a batch: up to M a row.

  Attributes:
    values: [B, M, …] what an encoder reads. Pictures and tiles [B, M, S, S, 3] uint8, red, green,
      blue; clips [B, M, F, S, S, 3] uint8; waveforms [B, M, L] float32 from -1 to 1; point clouds
      [B, M, P, 3 + C] float32, coordinates before features; passages [B, M, T] int32 tokens.
    counts: [B, M] int32 how many entries of the first axis of each medium are real (lines of
      pixels, frames, samples, points, tokens), the others after them; 0 where there is no medium.
    boxes: [B, M, 5] float32 of tiles: number of the picture in its row, then top, left, bottom and
      right as shares of the whole picture as it is shown. None of other kinds.
  """

  values: jax.Array
  counts: jax.Array
  boxes: jax.Array | None = None

  @property
  def real(self) -> jax.Array:
    """[B, M] bool, False where a row has no such medium."""
    return self.counts > 0


@struct.dataclass
class Memory:
  """A second stream that tokens may attend to.

  Attributes:
    values: [B, S, D] vectors, such as an encoder makes.
    positions: [B, S] int32 place of each in its segment.
    segments: [B, S] int32 segment of the row's tokens that may see it; 0 is padding.
    modality: [B, S] int32, see `MODALITIES`; None where that is of no interest.
  """

  values: jax.Array
  positions: jax.Array
  segments: jax.Array
  modality: jax.Array | None = None


@struct.dataclass
class Context:
  """The per-call facts that travel through the stack beside the activations.

  Attributes:
    tokens: [B, T] int32 token ids.
    positions: [B, T] int32 place of each token in its segment; with a cache, its slot too.
    segments: [B, T] int32 packed document of each token, from 1; 0 is padding.
    modality: [B, T] int32, one of `TEXT`, `IMAGE`, `VIDEO`, `SOUND`, `POINTS`; None where all is
      text.
    media: by kind, those of `MEDIA`; None in text. They are for the embedding; the layers of the
      stack do not get them.
    placeholders: [B, T] int32 which embedding of the row's media stands in the token's place: all
      kinds one after the other in the order of `MEDIA`, in each kind all media, from 0; -1 is a
      token, `NEWLINE` and `SEPARATOR` are vectors of their own. None without media.
    coordinates: [B, T, A] place of each token along the A axes of a grid or of space, for
      encoders; None where positions say all.
    memory: a second stream for cross-attention, or None.
    step: scalar int32 training step, or None.
    key: random key of the step's noise, or None. A layer asks for one of its own, of the stream
      `noise`, where there is one.
    rules: how activations are laid out over the mesh.
    parallel: how tokens reach keys, and in which order they lie, where `rules` spreads T.
  """

  tokens: jax.Array
  positions: jax.Array
  segments: jax.Array
  modality: jax.Array | None = None
  media: dict[str, Media] | None = None
  placeholders: jax.Array | None = None
  coordinates: jax.Array | None = None
  memory: Memory | None = None
  step: jax.Array | None = None
  key: jax.Array | None = None
  rules: Rules = struct.field(pytree_node=False, default=Rules())
  parallel: ContextParallel = struct.field(pytree_node=False, default=Ring())

  @property
  def sequence_axes(self) -> tuple[str, ...]:
    """Mesh axes that share the T tokens; none where attention is left to the compiler.

    So are tokens that the devices do not divide (one, in decoding), which are whole on each.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in self.rules.seq if axis in mesh.auto_axes)
    count = shard_count(axes, dict(mesh.shape))
    if count == 1 or self.tokens.shape[1] % count or isinstance(self.parallel, Partitioned):
      return ()
    return axes

  @property
  def row_axes(self) -> tuple[str, ...]:
    """Mesh axes that share the B rows; none that are dealt with, or do not divide them."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in self.rules.batch if axis in mesh.auto_axes)
    return axes if self.tokens.shape[0] % shard_count(axes, dict(mesh.shape)) == 0 else ()

  def tokens_ahead(self, places: int) -> jax.Array:
    """Returns the token `places` after each one in its row, [B, T] int32; 0 beyond the end."""
    return in_order(shift_left, self.tokens, places, rules=self.rules, parallel=self.parallel)

  def places(self, tokens: np.ndarray) -> np.ndarray:
    """Returns where tokens of the row, by their numbers [n] in it, lie in the arrays here."""
    numbers = np.arange(self.tokens.shape[1])[None]
    held = arrange(numbers, self.parallel.order, sequence_devices(self.rules))
    return np.argsort(held[0])[tokens]

  def between_layouts(self, x: jax.Array) -> jax.Array:
    """Lays out embeddings [B, T, D] half way from how they are looked up to where tokens lie.

    Where the table's channels lie along axes of rows and of tokens, the compiler finds a way for
    one of the two at a time; for both at once it makes all embeddings whole on every device.
    """
    axes, embed = self.sequence_axes, self.rules.embed
    rest = tuple(axis for axis in embed if axis not in axes)
    if not rest or len(rest) == len(embed):
      return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(None, axes, rest))

  @property
  def real(self) -> jax.Array:
    """[B, T] bool, False on padding."""
    return self.segments > 0

  def own(self) -> Seen:
    """Says that the tokens see those before them in their own segment."""
    return Seen(self.positions, self.positions, self.segments, self.segments)

  def rows(self, function: Callable[[jax.Array], jax.Array]) -> 'Context':
    """Returns the context with a function applied to every array that has rows, [B, ...]."""
    names = ('tokens', 'positions', 'segments', 'modality', 'media', 'placeholders', 'memory')
    return dataclasses.replace(
      self, **{name: jax.tree.map(function, getattr(self, name)) for name in names}
    )

  def slots(self, room: int) -> jax.Array:
    """Returns the slot of each token in a cache of `room` slots, [B, T]: its position.

    Padding has a slot beyond the end, which no write reaches.
    """
    return jnp.where(self.real, self.positions, room)


def shift_left(x: jax.Array, places: int) -> jax.Array:
  """Moves [B, T] to the left; zeros come in."""
  return jnp.pad(x[:, places:], ((0, 0), (0, min(places, x.shape[1]))))


def sequence_devices(rules: Rules) -> int:
  """Returns how many devices share a row on the mesh that is set; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else shard_count(rules.seq, dict(mesh.shape))


def in_order(
  function: Callable[..., jax.Array],
  x: jax.Array,
  *arguments: Any,
  rules: Rules,
  parallel: ContextParallel,
) -> jax.Array:
  """Applies a function [B, T] -> [B, T] to tokens in the order of the row, however they lie."""
  order, devices = parallel.order, sequence_devices(rules)
  return arrange(function(restore(x, order, devices), *arguments), order, devices)


def text_context(tokens: jax.Array, rules: Rules | None = None) -> Context:
  """Returns the context of unpacked text [B, T] int32: one segment a row, positions from 0."""
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
  return Context(
    tokens=tokens,
    positions=positions,
    segments=jnp.ones_like(tokens),
    rules=Rules() if rules is None else rules,
  )


def packed_context(lengths: Sequence[Sequence[int]], length: int | None = None) -> Context:
  """Returns the context of rows of packed documents, [B, T] int32, as it would be of real text.

  Args:
    lengths: of the documents of each row, one after the other; what is left is padding.
    length: tokens T of a row; None is as many as the longest row has.
  """
  length = max(map(sum, lengths)) if length is None else length
  segments = np.zeros((len(lengths), length), np.int32)
  positions = np.zeros_like(segments)
  for row, documents in enumerate(lengths):
    start = 0
    for number, size in enumerate(documents, start=1):
      segments[row, start : start + size] = number
      positions[row, start : start + size] = np.arange(size)
      start += size
  tokens = jnp.asarray(segments)
  return Context(tokens=tokens, positions=jnp.asarray(positions), segments=tokens)
