"""How attention to chosen keys is cut into steps that fit into a TPU's fast memory: all static."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from deepseek_jax.ops.attention.gathered_loop import Form

LANES = 128
"""Width of the chip's vectors."""
TILE = 128
"""Keys that are fetched together and multiplied at once."""
STEP = 4096
"""Keys that a step of the grid visits, if sets are smaller: only its first tile is waited for."""
SETS = 16
"""Most sets of a step of the grid."""
MEMORY = 64 << 20
"""Bytes of VMEM that a chip has unless it says otherwise: v5p has them, v5e and v6e twice that."""
SHARE = 0.7
"""Part of VMEM that the arrays of a kernel may fill; products need room too."""


class Piece(NamedTuple):
  """Whole vectors of a row of which a part of its words has the channels.

  Attributes:
    part: which numbers of the words.
    words: where these words are.
    lanes: where the channels are if all pieces are put side by side.
    channels: how many channels there are.
  """

  part: int
  words: slice
  lanes: slice
  channels: int


class Row(NamedTuple):
  """How the channels of a row are laid out in words of 32 bits, for one group of heads.

  Two bfloat16 numbers share a word: a row has two parts, whose words are the same. Each has its
  share of the value; what is key alone fills up the words of the first part, then of the second.

  Attributes:
    value: channels of the value in a part.
    rests: channels in each part that are key alone.
    shared: whether the value is key too.
  """

  value: int
  rests: tuple[int, ...]
  shared: bool

  @property
  def parts(self) -> int:
    """Numbers of a word."""
    return len(self.rests)

  @property
  def out(self) -> int:
    """Words of a value."""
    return round_up(self.value, LANES)

  @property
  def width(self) -> int:
    """Words of a row."""
    return self.out + round_up(self.rests[0], LANES)

  @property
  def values(self) -> list[Piece]:
    """The pieces of the value."""
    places = [slice(part * self.out, (part + 1) * self.out) for part in range(self.parts)]
    return [Piece(n, slice(0, self.out), lanes, self.value) for n, lanes in enumerate(places)]

  @property
  def others(self) -> list[Piece]:
    """The pieces of what is key alone."""
    found, at = [], self.parts * self.out
    for part, count in enumerate(self.rests):
      size = round_up(count, LANES)
      words, lanes = slice(self.out, self.out + size), slice(at, at + size)
      found += [Piece(part, words, lanes, count)] if count else []
      at += size
    return found

  @property
  def keys(self) -> list[tuple[slice, Piece]]:
    """The pieces that are multiplied as keys, and where in a query their counterparts are."""
    pieces = self.values + self.others if self.shared else self.others
    first = pieces[0].lanes.start
    return [(slice(x.lanes.start - first, x.lanes.stop - first), x) for x in pieces]

  @property
  def key(self) -> int:
    """Lanes of a query."""
    return self.keys[-1][0].stop

  @property
  def lanes(self) -> int:
    """Lanes of all pieces side by side."""
    return (self.values + self.others)[-1].lanes.stop


class Cut(NamedTuple):
  """How a call is cut into steps of the grid.

  Attributes:
    repeat: pieces that the queries of a set are cut into; each fetches the keys for itself.
    queries: queries Q of a piece.
    share: heads R of a group.
    sets: sets g of a step.
    steps: steps that all sets of a row of the batch take.
    groups: groups of heads of a step.
    chunks: steps that all groups take.
    tiles: tiles of keys of a set.
    resident: whether all rows of the batch's row are in VMEM, and tiles are made of them there.
  """

  repeat: int
  queries: int
  share: int
  sets: int
  steps: int
  groups: int
  chunks: int
  tiles: int
  resident: bool

  @property
  def rows(self) -> int:
    """Rows X of the scores of a group and a set: its queries, each with all heads."""
    return self.queries * self.share


class Call(NamedTuple):
  """All that is static in a kernel.

  Attributes:
    form: what is static in the call of attention.
    row: how a row is laid out.
    cut: how the call is cut.
    slots: keys S of a row of the batch.
    segments: whether the queries of a set see keys of their segment alone.
    biased: whether scores have a bias.
  """

  form: Form
  row: Row
  cut: Cut
  slots: int
  segments: bool
  biased: bool


def lay_out(form: Form, dtype: Any) -> Row:
  """Returns how the rows of a call are laid out."""
  parts = 4 // jnp.dtype(dtype).itemsize
  first, size = form.value
  rest = form.key - size if first == 0 else form.key
  # As few words as hold it in all parts, and of these the first part has as much as goes in.
  room = round_up(-(-rest // parts), LANES)
  rests = (min(rest, room), max(rest - room, 0))[:parts]
  return Row(-(-size // parts), rests, first == 0)


def cut_up(
  form: Form, query: jax.Array, rows: jax.Array, indices: jax.Array, backward: bool
) -> Cut | None:
  """Returns the largest steps whose arrays fit into VMEM, or None where none do.

  Args:
    form: what is static in the call of attention.
    query: [B, T, H, K], whose sizes are looked at alone, as those of the others are.
    rows: [B, G, S, W].
    indices: [B, N, m].
    backward: whether it is for the gradient.
  """
  row, (_, groups, slots, _) = lay_out(form, rows.dtype), rows.shape
  tiles = -(-indices.shape[2] // TILE)
  pieces = [n for n in range(1, form.block + 1) if form.block % (8 * n) == 0] or [1]
  limit = int(SHARE * memory())
  divisors = [n for n in range(1, groups + 1) if groups % n == 0]
  for resident, chunks, repeat in itertools.product((True, False), divisors, pieces):
    count = indices.shape[1] * repeat
    most = min(SETS, max(STEP // (tiles * TILE), 1), count) if repeat == 1 else 1
    while most:
      sets = _even(count, most)
      cut = Cut(
        repeat=repeat,
        queries=form.block // repeat,
        share=query.shape[2] // groups,
        sets=sets,
        steps=-(-count // sets),
        groups=groups // chunks,
        chunks=chunks,
        tiles=tiles,
        resident=resident,
      )
      if vmem_bytes(form, row, cut, slots, rows.dtype.itemsize, backward) <= limit:
        return cut
      most //= 2
  return None


def _even(count: int, most: int) -> int:
  """Returns a divisor of `count`, so that nothing need be filled up, unless they are small."""
  divisor = max(n for n in range(1, most + 1) if count % n == 0)
  return divisor if 2 * divisor > most else most


def memory() -> int:
  """Bytes of VMEM of the chip that is here, or of any that is likely."""
  if jax.default_backend() == 'tpu':
    return pltpu.get_tpu_info().vmem_capacity_bytes
  return MEMORY


def vmem_bytes(form: Form, row: Row, cut: Cut, slots: int, size: int, backward: bool) -> int:
  """VMEM that the arrays of a step take; blocks that are read or written are there twice."""
  x, keys = round_up(cut.rows, 8), cut.tiles * TILE
  pairs = cut.sets * cut.groups * x
  out, column = row.parts * row.out, LANES * 4
  blocks = pairs * (row.key * size + out * size + column)
  blocks += cut.sets * (8 * keys * 4 + round_up(cut.queries, 8) * column)
  held = (2 * TILE + (slots if cut.resident else 0)) * cut.groups * row.width * 4
  held += 4 * x * TILE * 4 + 3 * TILE * row.parts * row.width * 4
  if backward:
    blocks += pairs * row.key * size
    wide = cut.groups * row.lanes + LANES
    held += cut.groups * x * row.key * 4 + x * row.key * 4
    held += (round_up(slots, 8) + 2 * TILE) * wide * 4
  else:
    held += cut.groups * x * (out * 4 + 2 * column) + x * out * 4
    if form.mass:
      blocks += cut.sets * round_up(cut.queries, 8) * keys * 4
      held += cut.groups * x * keys * 4
  return 2 * blocks + held


def round_up(size: int, multiple: int) -> int:
  """Returns the next multiple."""
  return -(-size // multiple) * multiple
