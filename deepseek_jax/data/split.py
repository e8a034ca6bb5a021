"""Which documents are held out: a matter of their own text, whatever else there is."""

import hashlib
from collections.abc import Sequence
from typing import Literal

from deepseek_jax.core.config import ConfigError

Split = Literal['train', 'heldout']
SPLITS: tuple[Split, ...] = ('train', 'heldout')


def place_of(text: str) -> float:
  """A number in [0, 1) that depends on the text alone."""
  digest = hashlib.sha256(text.encode('utf-8')).digest()
  return int.from_bytes(digest[:6], 'big') / 2**48


def heldout_cut(places: Sequence[float], fraction: float, where: str) -> float:
  """Documents placed at or below this number are held out; some are, and some are not.

  Args:
    places: of all documents, from `place_of`.
    fraction: share that is to be held out.
    where: what to name in an error.

  Raises:
    ConfigError: all documents have one place.
  """
  # With few documents the hash may hold out none, or all: one, or all but one, then.
  lowest, highest = min(places), max(places)
  if lowest == highest:
    raise ConfigError(
      f'{where}: all {len(places)} documents are the same text; expected at least two'
    )
  cut = max(fraction, lowest)
  return cut if cut < highest else max(place for place in places if place < highest)
