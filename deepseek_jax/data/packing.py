"""Fits documents of any length into rows of one length, losing no token and repeating no target."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from deepseek_jax.data import store
from deepseek_jax.data.progress import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackPlan:
  """Which piece of which document goes to which row.

  A piece covers the inputs `tokens[start : start + count]` and, one further, as many targets.

  Attributes:
    pieces: [P, 3] int64: start in the token array, count, document; the pieces of row 0 first.
    rows: [R + 1] int64: where the pieces of each row start.
    length: tokens in a row.
  """

  pieces: np.ndarray
  rows: np.ndarray
  length: int

  @property
  def occupancy(self) -> float:
    """Share of the places that hold a token."""
    return float(self.pieces[:, 1].sum() / ((len(self.rows) - 1) * self.length))


def split_documents(offsets: np.ndarray, length: int) -> np.ndarray:
  """Cuts documents into pieces of at most `length` inputs, [P, 3] int64, in reading order.

  A document of n tokens has n - 1 targets, so n - 1 inputs: its last token is a target only. Every
  piece but the last of a document is `length` long.

  Args:
    offsets: [documents + 1] where each document starts.
    length: tokens in a row.
  """
  starts = np.asarray(offsets[:-1], np.int64)
  inputs = np.diff(offsets).astype(np.int64) - 1
  counts = -(-inputs // length)
  document = np.repeat(np.arange(len(starts)), counts)
  first = np.cumsum(counts) - counts
  place = (np.arange(counts.sum()) - first[document]) * length
  return np.stack(
    [starts[document] + place, np.minimum(inputs[document] - place, length), document], axis=1
  )


def best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
  """Row of each piece under best-fit decreasing, int64 [P].

  Largest first, each piece goes to the fullest row that still has room for it.

  Args:
    sizes: [P] tokens of each piece, from 1 to `length`; equal sizes keep their order.
    length: tokens in a row.

  Source: Ding et al. 2024, 'Fewer Truncations Improve Language Modeling', section 3.
  """
  row_of = np.empty(len(sizes), np.int64)
  order = np.argsort(-sizes, kind='stable')
  full = int(np.count_nonzero(sizes == length))
  row_of[order[:full]] = np.arange(full)
  # rows_with[room] lists the rows with that much room; bit `room` of `open_rooms` says it is not
  # empty, which makes "the smallest room that is enough" two operations on one integer.
  rows_with: list[list[int]] = [[] for _ in range(length + 1)]
  open_rooms = 0
  rows = full
  chosen = []
  progress = Progress('packing', 'pieces')
  for count, size in enumerate(sizes[order[full:]].tolist()):
    enough = open_rooms >> size
    if enough:
      room = size + (enough & -enough).bit_length() - 1
      row = rows_with[room].pop()
      if not rows_with[room]:
        open_rooms ^= 1 << room
    else:
      room, row = length, rows
      rows += 1
    left = room - size
    if left:
      rows_with[left].append(row)
      open_rooms |= 1 << left
    chosen.append(row)
    if not count % 65536:
      progress.update(count)
  progress.finish(len(chosen))
  row_of[order[full:]] = chosen
  return row_of


def make_plan(offsets: np.ndarray, length: int, seed: int) -> PackPlan:
  """Packs documents into rows.

  Args:
    offsets: [documents + 1] where each document starts in the token array.
    length: tokens in a row.
    seed: which of equally long pieces comes first; so that rows mix sources.
  """
  pieces = split_documents(offsets, length)
  pieces = pieces[np.random.default_rng(seed).permutation(len(pieces))]
  row_of = best_fit(pieces[:, 1], length)
  order = np.argsort(row_of, kind='stable')
  counts = np.bincount(row_of)
  rows = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
  return PackPlan(pieces=pieces[order], rows=rows, length=length)


def pack_plan(
  offsets: np.ndarray, fingerprint: str, length: int, seed: int, folder: pathlib.Path
) -> PackPlan:
  """The plan from the store, or computed now.

  Args:
    offsets: [documents + 1] where each document starts in the token array.
    fingerprint: of the token array.
    length: tokens in a row.
    seed: see `make_plan`.
    folder: of the store.
  """

  def build(scratch: pathlib.Path) -> dict[str, Any]:
    plan = make_plan(offsets, length, seed)
    np.save(scratch / 'pieces.npy', plan.pieces)
    np.save(scratch / 'rows.npy', plan.rows)
    return {}

  name = store.key('plan', {'tokens': fingerprint, 'length': length, 'seed': seed})
  entry = store.entry(folder, name, build)
  return PackPlan(pieces=entry.array('pieces'), rows=entry.array('rows'), length=length)
