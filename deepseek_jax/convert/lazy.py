"""Arrays that are read when they are needed, and only the part that is.

A released checkpoint is larger than the memory of a host. What a model needs is therefore said
first (this tensor transposed, those stacked, a part of that one), and read last: each device's own
part, out of files that are mapped into memory.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from deepseek_jax.formats import float4

Index = tuple[slice, ...]
"""One slice for each axis, with a beginning, an end and no step."""
STRIP = 16
"""Columns of a transposed array that are copied together."""


@dataclasses.dataclass(frozen=True, eq=False)
class Lazy:
  """An array that is not in memory.

  Attributes:
    shape: its sizes.
    dtype: of what is read.
    read: returns a part of it, of the size that its slices say.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[Index], np.ndarray]

  def __getitem__(self, index: Any) -> np.ndarray:
    """Reads a part; `index` is a slice or a tuple of slices, as of an array, without steps."""
    given = index if isinstance(index, tuple) else (index,)
    if Ellipsis in given:
      place = given.index(Ellipsis)
      missing = len(self.shape) - len(given) + 1
      given = (*given[:place], *(slice(None),) * missing, *given[place + 1 :])
    given = (*given, *(slice(None),) * (len(self.shape) - len(given)))
    slices = []
    for part, size in zip(given, self.shape, strict=True):
      start, stop, step = part.indices(size)
      if step != 1:
        raise IndexError(f'{part}: expected a slice without a step')
      slices.append(slice(start, max(start, stop)))
    return self.read(tuple(slices))

  @property
  def bytes(self) -> int:
    """Of all of it, as it is read."""
    return math.prod(self.shape) * self.dtype.itemsize

  def whole(self) -> np.ndarray:
    """Reads all of it."""
    return self[...]


def fill(target: np.ndarray, source: np.ndarray) -> None:
  """Copies an array into another of its shape; one that is transposed strip by strip.

  NumPy goes along the rows of the target, and so through the source in steps that miss its cache.
  """
  if source.ndim == 2 and source.strides[0] == source.itemsize < source.strides[1]:
    for start in range(0, source.shape[1], STRIP):
      target[:, start : start + STRIP] = source[:, start : start + STRIP]
  else:
    target[...] = source


def stored(array: np.ndarray) -> Lazy:
  """Returns an array that is in memory, or mapped into it."""
  return Lazy(array.shape, array.dtype, lambda index: array[index])


def transposed(x: Lazy, axes: Sequence[int] | None = None) -> Lazy:
  """Returns `x` with its axes in another order; the other way round unless told."""
  order = tuple(axes) if axes is not None else tuple(reversed(range(len(x.shape))))
  back = tuple(np.argsort(order))

  def read(index: Index) -> np.ndarray:
    return x.read(tuple(index[place] for place in back)).transpose(order)

  return Lazy(tuple(x.shape[axis] for axis in order), x.dtype, read)


def stacked(parts: Sequence[Lazy]) -> Lazy:
  """Returns equal arrays one after the other, along a new first axis."""
  first = parts[0]
  for part in parts[1:]:
    if part.shape != first.shape:
      raise ValueError(f'{list(part.shape)}: expected {list(first.shape)}, as of the first part')

  def read(index: Index) -> np.ndarray:
    chosen, rest = parts[index[0]], index[1:]
    sizes = (s.stop - s.start for s in rest)
    result = np.empty((len(chosen), *sizes), first.dtype)
    for place, part in enumerate(chosen):
      fill(result[place], part.read(rest))
    return result

  return Lazy((len(parts), *first.shape), first.dtype, read)


def part_of(x: Lazy, axis: int, start: int, stop: int) -> Lazy:
  """Returns `x` from `start` to `stop` along an axis."""

  def read(index: Index) -> np.ndarray:
    own = slice(index[axis].start + start, index[axis].stop + start)
    return x.read((*index[:axis], own, *index[axis + 1 :]))

  return Lazy((*x.shape[:axis], stop - start, *x.shape[axis + 1 :]), x.dtype, read)


def unflattened(x: Lazy, axis: int, outer: int) -> Lazy:
  """Returns `x` with an axis cut into `outer` equal ones, and their places as the next axis."""
  inner, rest = divmod(x.shape[axis], outer)
  if rest:
    raise ValueError(f'{list(x.shape)}: {outer} does not divide axis {axis}')

  def read(index: Index) -> np.ndarray:
    own, within = index[axis], index[axis + 1]
    rows = slice(own.start * inner, own.stop * inner)
    found = x.read((*index[:axis], rows, *index[axis + 2 :]))
    shape = (*found.shape[:axis], own.stop - own.start, inner, *found.shape[axis + 1 :])
    return found.reshape(shape)[(*(slice(None),) * (axis + 1), within)]

  return Lazy((*x.shape[:axis], outer, inner, *x.shape[axis + 1 :]), x.dtype, read)


def flattened(x: Lazy, axis: int) -> Lazy:
  """Returns `x` with an axis and the next one as a single axis: the inverse of `unflattened`."""
  outer, inner = x.shape[axis : axis + 2]

  def read(index: Index) -> np.ndarray:
    want = index[axis]
    first = want.start // inner
    last = max(-(-want.stop // inner), first)
    all_inner = slice(0, inner)
    found = x.read((*index[:axis], slice(first, last), all_inner, *index[axis + 1 :]))
    rows = found.reshape(*found.shape[:axis], (last - first) * inner, *found.shape[axis + 2 :])
    own = slice(want.start - first * inner, want.stop - first * inner)
    return rows[(*(slice(None),) * axis, own)]

  return Lazy((*x.shape[:axis], outer * inner, *x.shape[axis + 2 :]), x.dtype, read)


def cast(x: Lazy, dtype: DTypeLike) -> Lazy:
  """Returns `x` in another dtype."""
  wanted = np.dtype(dtype)
  if wanted == x.dtype:
    return x
  return Lazy(x.shape, wanted, lambda index: x.read(index).astype(wanted))


def scaled_tiles(values: Lazy, scales: Lazy, tile: tuple[int, int]) -> Lazy:
  """Returns float32 numbers of eight-bit ones [M, N] and of the scales of their tiles.

  Args:
    values: [M, N] float8.
    scales: [⌈M / m⌉, ⌈N / n⌉] float32 or float8_e8m0fnu.
    tile: rows m and columns n that share a scale; see `formats.float8`.
  """
  want = tuple(-(-size // part) for size, part in zip(values.shape, tile, strict=True))
  if scales.shape != want:
    raise ValueError(f'scales {list(scales.shape)}: expected {list(want)}')
  numbers = np.arange(256, dtype=np.uint8).view(values.dtype).astype(np.float32)

  def read(index: Index) -> np.ndarray:
    covering = tuple(
      slice(s.start // part, -(-s.stop // part)) for s, part in zip(index, tile, strict=True)
    )
    factors = scales.read(covering).astype(np.float32)
    for axis, (s, part) in enumerate(zip(index, tile, strict=True)):
      factors = np.repeat(factors, part, axis=axis)
      skip = s.start % part
      factors = factors[(*(slice(None),) * axis, slice(skip, skip + s.stop - s.start))]
    return numbers[values.read(index).view(np.uint8)] * factors

  return Lazy(values.shape, np.dtype(np.float32), read)


def scaled_fours(values: Lazy, scales: Lazy) -> Lazy:
  """Returns float32 numbers of four-bit ones, two a byte, and of the scales of their blocks.

  Args:
    values: [M, N / 2] bytes; see `formats.float4`.
    scales: [M, N / 32] float8_e8m0fnu.
  """
  rows, columns = values.shape[0], values.shape[1] * 2
  if scales.shape != (rows, columns // float4.BLOCK):
    raise ValueError(f'scales {list(scales.shape)}: expected {[rows, columns // float4.BLOCK]}')
  positive = np.asarray(float4.GRID, np.float32)
  numbers = np.concatenate([positive, -positive])

  def read(index: Index) -> np.ndarray:
    own, want = index
    blocks = slice(want.start // float4.BLOCK, -(-want.stop // float4.BLOCK))
    start, stop = blocks.start * float4.BLOCK, blocks.stop * float4.BLOCK
    packed = values.read((own, slice(start // 2, stop // 2))).view(np.uint8)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), stop - start)
    factors = scales.read((own, blocks)).astype(np.float32)
    wide = numbers[codes] * np.repeat(factors, float4.BLOCK, axis=1)
    return wide[:, want.start - start : want.stop - start]

  return Lazy((rows, columns), np.dtype(np.float32), read)
