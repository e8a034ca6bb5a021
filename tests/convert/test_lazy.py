"""Any part of an array that is not in memory is that part of the array."""

import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.convert import lazy
from deepseek_jax.formats import float4, float8

RNG = np.random.default_rng(0)


def numbers(*shape):
  return RNG.standard_normal(shape).astype(np.float32)


A, B, C = numbers(6, 10), numbers(6, 10), numbers(4, 10)
EIGHT = float8.encode(numbers(37, 21), (8, 16), 'float32')
FOUR = float4.encode(numbers(5, 96))
STORED = {name: lazy.stored(array) for name, array in (('a', A), ('b', B), ('c', C))}
PAIRS = {
  'stored': (STORED['a'], A),
  'transposed': (lazy.transposed(STORED['a']), A.T),
  'turned': (
    lazy.transposed(lazy.unflattened(STORED['a'], 1, 5), (2, 0, 1)),
    A.reshape(6, 5, 2).transpose(2, 0, 1),
  ),
  'stacked': (lazy.stacked([STORED['a'], STORED['b']]), np.stack([A, B])),
  'part': (lazy.part_of(STORED['a'], 1, 3, 9), A[:, 3:9]),
  'heads': (lazy.unflattened(STORED['a'], 0, 3), A.reshape(3, 2, 10)),
  'flat': (lazy.flattened(lazy.stored(A.reshape(3, 2, 10)), 0), A),
  'flat_inside': (lazy.flattened(lazy.stored(A.reshape(6, 5, 2)), 1), A),
  'cast': (lazy.cast(STORED['a'], ml_dtypes.bfloat16), A.astype(ml_dtypes.bfloat16)),
  'tiles': (
    lazy.scaled_tiles(*(lazy.stored(np.asarray(part)) for part in EIGHT), (8, 16)),
    np.asarray(float8.decode(EIGHT, (8, 16))),
  ),
  'fours': (
    lazy.scaled_fours(*(lazy.stored(np.asarray(part)) for part in FOUR)),
    np.asarray(float4.decode(FOUR)),
  ),
  'experts': (
    lazy.stacked(
      [lazy.transposed(lazy.part_of(STORED[name], 0, 1, 4)) for name in ('a', 'b', 'c')]
    ),
    np.stack([x[1:4].T for x in (A, B, C)]),
  ),
}


@pytest.mark.parametrize('name', PAIRS)
def test_parts(name):
  """Of any size, in any place; the whole; nothing at all."""
  found, array = PAIRS[name]
  assert found.shape == array.shape
  assert found.dtype == array.dtype
  assert found.bytes == array.nbytes
  np.testing.assert_array_equal(found.whole(), array)
  rng = np.random.default_rng(1)
  for _ in range(60):
    index = []
    for size in array.shape:
      start, stop = sorted(rng.integers(0, size + 1, 2))
      index.append(slice(int(start), int(stop)))
    part = found[tuple(index)]
    assert part.dtype == array.dtype
    np.testing.assert_array_equal(part, array[tuple(index)])
  np.testing.assert_array_equal(found[1:], array[1:])
  np.testing.assert_array_equal(found[..., 1:], array[..., 1:])


def test_only_what_is_asked_for_is_read():
  """One row of one expert touches no other tensor."""
  asked = []

  def watched(number):
    def read(index):
      asked.append((number, index))
      return A[index]

    return lazy.Lazy(A.shape, A.dtype, read)

  every = lazy.stacked([lazy.transposed(watched(number)) for number in range(5)])
  np.testing.assert_array_equal(every[2:3, 4:5], A.T[None, 4:5])
  assert asked == [(2, (slice(0, 6), slice(4, 5)))]


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: lazy.stacked([STORED['a'], STORED['c']]), r'\[4, 10\]: expected \[6, 10\]'),
    (lambda: lazy.unflattened(STORED['a'], 1, 4), r'4 does not divide axis 1'),
    (lambda: lazy.scaled_tiles(STORED['a'], STORED['c'], (8, 8)), r'expected \[1, 2\]'),
    (lambda: lazy.scaled_fours(STORED['a'], STORED['c']), r'scales \[4, 10\]: expected \[6, 0\]'),
  ],
)
def test_what_does_not_fit(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_no_steps():
  with pytest.raises(IndexError, match='without a step'):
    STORED['a'][::2]


@pytest.mark.parametrize('shape', [(1, 1), (7, 37), (37, 45), (16, 1), (1, 64)])
def test_fill(shape):
  """As NumPy copies, whichever way the source lies."""
  x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  for source in (x, x.T, x[::-1], np.asfortranarray(x), x[:, :1].T):
    target = np.full(source.shape, np.nan, np.float32)
    lazy.fill(target, source)
    np.testing.assert_array_equal(target, source)
