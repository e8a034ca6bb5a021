"""How one array of ours lies in published tensors: linear maps are [out, in] there."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from deepseek_jax.convert.lazy import Lazy, flattened, stacked, transposed, unflattened


class Form(Protocol):
  """A change of layout and its inverse."""

  def ours(self, parts: Sequence[Lazy]) -> Lazy:
    """Returns our array of the published tensors."""

  def theirs(self, x: Lazy) -> list[Lazy]:
    """Returns the published tensors of our array."""


@dataclasses.dataclass(frozen=True)
class Same:
  """As it is."""

  def ours(self, parts: Sequence[Lazy]) -> Lazy:
    """Returns the only tensor."""
    return parts[0]

  def theirs(self, x: Lazy) -> list[Lazy]:
    """Returns the array."""
    return [x]


@dataclasses.dataclass(frozen=True)
class Turned:
  """[in, out] for [out, in]."""

  def ours(self, parts: Sequence[Lazy]) -> Lazy:
    """Returns [in, out]."""
    return transposed(parts[0])

  def theirs(self, x: Lazy) -> list[Lazy]:
    """Returns [out, in]."""
    return [transposed(x)]


@dataclasses.dataclass(frozen=True)
class ToHeads:
  """[in, H, C] for [H · C, in].

  Attributes:
    heads: H.
  """

  heads: int

  def ours(self, parts: Sequence[Lazy]) -> Lazy:
    """Returns [in, H, C]."""
    return unflattened(transposed(parts[0]), 1, self.heads)

  def theirs(self, x: Lazy) -> list[Lazy]:
    """Returns [H · C, in]."""
    return [transposed(flattened(x, 1))]


@dataclasses.dataclass(frozen=True)
class FromHeads:
  """[H, C, out] for [out, H · C].

  Attributes:
    heads: H.
  """

  heads: int

  def ours(self, parts: Sequence[Lazy]) -> Lazy:
    """Returns [H, C, out]."""
    return unflattened(transposed(parts[0]), 0, self.heads)

  def theirs(self, x: Lazy) -> list[Lazy]:
    """Returns [out, H · C]."""
    return [transposed(flattened(x, 0))]


@dataclasses.dataclass(frozen=True)
class FromGroups:
  """[H, C, out] for [G · out, H / G · C]: heads of a group have a matrix together.

  Attributes:
    heads: H.
    groups: G.
  """

  heads: int
  groups: int

  def ours(self, parts: Sequence[Lazy]) -> Lazy:
    """Returns [H, C, out]."""
    grouped = unflattened(parts[0], 0, self.groups)
    split = unflattened(grouped, 2, self.heads // self.groups)
    return flattened(transposed(split, (0, 2, 3, 1)), 0)

  def theirs(self, x: Lazy) -> list[Lazy]:
    """Returns [G · out, H / G · C]."""
    split = unflattened(x, 0, self.groups)
    return [flattened(flattened(transposed(split, (0, 3, 1, 2)), 2), 0)]


@dataclasses.dataclass(frozen=True)
class Experts:
  """[E, in, out] for E times [out, in]."""

  def ours(self, parts: Sequence[Lazy]) -> Lazy:
    """Returns [E, in, out]."""
    return stacked([transposed(part) for part in parts])

  def theirs(self, x: Lazy) -> list[Lazy]:
    """Returns E times [out, in]."""
    return [transposed(only(x, place)) for place in range(x.shape[0])]


def only(x: Lazy, place: int) -> Lazy:
  """Returns one entry of the first axis, without that axis."""
  own = slice(place, place + 1)
  return Lazy(x.shape[1:], x.dtype, lambda index: x.read((own, *index))[0])
