"""Which document goes to which row: mixed by weight, packed with room for media."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data import store
from deepseek_jax.data.media.encode import KINDS, Encoded
from deepseek_jax.data.packing import split_documents

# Rows that are kept open for what comes; more would pack hardly better and take longer.
_OPEN_ROWS = 128
_MOST_PIECES = 20_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
  """Several documents a row, as many as fit; attention never crosses from one to the other.

  Attributes:
    image: most pictures in a row.
    video: most clips.
    sound: most sounds.
    points: most clouds of points.
  """

  image: int = 4
  video: int = 2
  sound: int = 2
  points: int = 2

  def __post_init__(self):
    errors = [
      f'`{kind}` is {most}; expected 1 or more'
      for kind in KINDS
      if (most := getattr(self, kind)) < 1
    ]
    if errors:
      raise ConfigError(errors)

  def most(self, kind: str, needed: int) -> int:
    """Media of a kind that a row has room for.

    Args:
      kind: one of `KINDS`.
      needed: most that a document has.
    """
    return max(getattr(self, kind), needed) if needed else 0

  @property
  def together(self) -> int:
    """Documents that a row may hold."""
    return 2**31

  def places(self, slots: int) -> int:
    """Places of a row that a medium takes: one for each of its embeddings."""
    return slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marked(Packed):
  """Several documents a row; each medium is beside the row, and one place says where it belongs.

  For models whose words attend to media in another stream.
  """

  def places(self, slots: int) -> int:
    """Places of a row that a medium takes: one."""
    return min(slots, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alone:
  """One document a row; its media stand in the row."""

  def most(self, kind: str, needed: int) -> int:
    """Media of a kind that a row has room for: those of the document that has most."""
    del kind
    return needed

  @property
  def together(self) -> int:
    """Documents that a row may hold."""
    return 1

  def places(self, slots: int) -> int:
    """Places of a row that a medium takes: one for each of its embeddings."""
    return slots


Layout = Packed | Marked | Alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaPlan:
  """Which piece of which document goes to which row.

  Attributes:
    pieces: [P, 4] int64: source, start in its tokens, count of inputs, document; those of row 0
      first.
    rows: [R + 1] int64: where the pieces of each row begin.
  """

  pieces: np.ndarray
  rows: np.ndarray


def source_pieces(documents: Encoded, length: int) -> np.ndarray:
  """Cuts documents into pieces of at most `length` inputs, [P, 3] int64, as `split_documents`.

  Text is cut; a document with media is one piece.

  Raises:
    ConfigError: a document with media is longer.
  """
  offsets = np.asarray(documents.offsets)
  inputs = np.diff(offsets) - 1
  long = np.flatnonzero((documents.media.sum(axis=1) > 0) & (inputs > length))
  if len(long):
    worst = long[np.argmax(inputs[long])]
    raise ConfigError(
      f'data.length is {length}, but {len(long)} documents with media are longer; the longest, '
      f'{documents.names[worst]}, has {inputs[worst]} tokens'
    )
  return split_documents(offsets, length)


def mix(counts: Sequence[int], weights: Sequence[float], rng: np.random.Generator) -> np.ndarray:
  """One epoch of a mixture: [N, 2] int64, source and number of a piece, in any order.

  It is the shortest in which every piece comes at least once and each source has its share; pieces
  of a source that is small for its weight come again, all of them before any comes a third time.

  Args:
    counts: pieces of each source.
    weights: share of each source, up to a factor.
    rng: decides which pieces come once more.

  Raises:
    ConfigError: the epoch would be longer than twenty million pieces.
  """
  shares = np.array(weights, np.float64) / np.sum(weights)
  total = float(np.max(np.array(counts) / shares))
  if total > _MOST_PIECES:
    rarest = int(np.argmax(np.array(counts) / shares))
    raise ConfigError(
      f'Mixture: source {rarest} has {counts[rarest]} pieces and a share of {shares[rarest]:.2g}; '
      f'an epoch that has them all would take {total:.3g} pieces, more than {_MOST_PIECES}'
    )
  chosen = []
  for source, count in enumerate(counts):
    wanted = max(count, round(shares[source] * total))
    rounds = [rng.permutation(count) for _ in range(-(-wanted // count))]
    numbers = np.concatenate(rounds)[:wanted]
    chosen.append(np.stack([np.full(wanted, source), numbers], axis=1))
  return rng.permutation(np.concatenate(chosen)).astype(np.int64)


def best_fit_media(
  sizes: np.ndarray, media: np.ndarray, length: int, most: np.ndarray
) -> np.ndarray:
  """Row of each piece [P] int64: largest first, into the fullest row with room for all of it.

  Args:
    sizes: [P] inputs of each piece.
    media: [P, K] media of each kind.
    length: inputs that a row holds.
    most: [K] media of each kind that a row holds.
  """
  row_of = np.empty(len(sizes), np.int64)
  rooms, left = np.zeros(_OPEN_ROWS, np.int64), np.zeros((_OPEN_ROWS, len(most)), np.int64)
  names = np.full(_OPEN_ROWS, -1)
  rows = 0
  for piece in np.argsort(-sizes, kind='stable'):
    size, needs = sizes[piece], media[piece]
    fits = (rooms >= size) & (left >= needs).all(axis=1) & (names >= 0)
    if fits.any():
      at = int(np.argmin(np.where(fits, rooms, length + 1)))
    else:
      # The fullest of the open rows is closed.
      at = int(np.argmin(rooms))
      rooms[at], left[at], names[at] = length, most, rows
      rows += 1
    rooms[at] -= size
    left[at] -= needs
    row_of[piece] = names[at]
  return row_of


def make_plan(
  documents: Sequence[Encoded],
  weights: Sequence[float] | None,
  length: int,
  layout: Layout,
  seed: int,
) -> MediaPlan:
  """Mixes and packs.

  Args:
    documents: of each source.
    weights: of each source; None takes every piece once.
    length: tokens in a row.
    layout: how rows are filled.
    seed: of the mixture, and of which of equally long pieces comes first.
  """
  rng = np.random.default_rng(seed)
  pieces = [source_pieces(d, length) for d in documents]
  counts = [len(p) for p in pieces]
  if weights is None:
    weights = [max(count, 1) for count in counts]
  order = mix(counts, weights, rng)
  drawn = np.concatenate([np.column_stack([np.full(len(p), k), p]) for k, p in enumerate(pieces)])[
    np.concatenate([[0], np.cumsum(counts)])[order[:, 0]] + order[:, 1]
  ]
  if layout.together == 1:
    return MediaPlan(pieces=drawn, rows=np.arange(len(drawn) + 1))
  media = np.concatenate([np.asarray(d.media) for d in documents])
  first = np.concatenate([[0], np.cumsum([len(d.media) for d in documents])])
  held = media[first[drawn[:, 0]] + drawn[:, 3]]
  # A picture stands in one piece, since a document with media is never cut.
  room = np.array([layout.most(kind, int(media[:, k].max())) for k, kind in enumerate(KINDS)])
  row_of = best_fit_media(drawn[:, 2], held, length, room)
  rows = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
  return MediaPlan(pieces=drawn[np.argsort(row_of, kind='stable')], rows=rows)


def media_plan(
  documents: Sequence[Encoded],
  weights: Sequence[float] | None,
  length: int,
  layout: Layout,
  seed: int,
  cache_dir: pathlib.Path,
) -> MediaPlan:
  """The plan from the store, or made now; see `make_plan`."""

  def build(scratch: pathlib.Path) -> dict[str, Any]:
    plan = make_plan(documents, weights, length, layout, seed)
    np.save(scratch / 'pieces.npy', plan.pieces)
    np.save(scratch / 'rows.npy', plan.rows)
    return {}

  parts = {
    'documents': [d.fingerprint for d in documents],
    'weights': None if weights is None else list(weights),
    'length': length,
    'layout': repr(layout),
    'seed': seed,
  }
  entry = store.entry(cache_dir, store.key('media_plan', parts), build)
  return MediaPlan(pieces=entry.array('pieces'), rows=entry.array('rows'))
