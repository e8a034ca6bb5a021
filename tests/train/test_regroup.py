"""Layers keep their address and their numbers, whichever scans they lie in."""

import numpy as np
import pytest

from deepseek_jax.models.plan import Segment
from deepseek_jax.train.regroup import Piece, collapse, match_pieces, pieces

# What a block is does not matter here.
A, B = 'A', 'B'


def leaf(*shape: int, dtype: type = np.float32) -> np.ndarray:
  return np.zeros(shape, dtype)


def test_pieces_of_a_plan():
  """A, then twice (A, B): layers 0; 1, 3; 2, 4."""
  segments = (Segment((A,), 1), Segment((A, B), 2))
  found = pieces(
    {
      'params/embedding': leaf(7, 3),
      'params/stack/segment_0/block_0/norm': leaf(3),
      'params/stack/segment_1/block_0/norm': leaf(2, 3),
      'opt_state/0/mu/stack/segment_1/block_1/norm': leaf(2, 3),
    },
    segments,
  )
  float32 = np.dtype(np.float32)
  one, two = 'params/stack/segment_1/block_0/norm', 'opt_state/0/mu/stack/segment_1/block_1/norm'
  assert found == {
    'params/embedding': Piece('params/embedding', None, (7, 3), float32),
    'params/layers/0/norm': Piece('params/stack/segment_0/block_0/norm', None, (3,), float32),
    'params/layers/1/norm': Piece(one, 0, (3,), float32),
    'params/layers/3/norm': Piece(one, 1, (3,), float32),
    'opt_state/0/mu/layers/2/norm': Piece(two, 0, (3,), float32),
    'opt_state/0/mu/layers/4/norm': Piece(two, 1, (3,), float32),
  }


def test_a_name_that_only_looks_stacked():
  found = pieces({'params/haystack/segment_0/block_0/norm': leaf(2)}, (Segment((A,), 1),))
  assert list(found) == ['params/haystack/segment_0/block_0/norm']


def test_what_fits_and_what_does_not():
  segments = (Segment((A,), 3),)
  source = pieces(
    {'stack/segment_0/block_0/a': leaf(3, 2), 'head': leaf(2, 9), 'old': leaf(1)}, segments
  )
  target = pieces(
    {'stack/segment_0/block_0/a': leaf(4, 2), 'head': leaf(2, 8), 'new': leaf(1)},
    (Segment((A,), 4),),
  )
  found = match_pieces(source, target)
  assert sorted(found.sources) == ['layers/0/a', 'layers/1/a', 'layers/2/a']
  assert found.fresh == ('layers/3/a', 'new')
  assert found.different == {'head': 'found float32[2, 9], expected float32[2, 8]'}
  assert found.unused == ('old',)
  other = pieces({'head': leaf(2, 9, dtype=np.float16)}, segments)
  assert match_pieces(source, other).different == {
    'head': 'found float32[2, 9], expected float16[2, 9]'
  }


@pytest.mark.parametrize(
  ('numbers', 'written'), [((0,), '0'), ((3, 1, 2), '1–3'), ((0, 1, 5, 7, 8), '0–1,5,7–8')]
)
def test_addresses_are_written_short(numbers, written):
  addresses = [f'params/layers/{number}/norm' for number in numbers]
  assert collapse(['head', *addresses]) == ['head', f'params/layers/{written}/norm']
