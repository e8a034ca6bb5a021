"""Which grid of tiles a picture is cut into, and in which order its embeddings stand."""

import itertools

import numpy as np
import pytest

from deepseek_jax.ops.tiling import best_grid, candidate_grids, picture_layout, whole_layout

NEWLINE, SEPARATOR = -2, -3


def test_candidates():
  grids = candidate_grids(9)
  assert set(grids) == {(r, c) for r, c in itertools.product(range(1, 10), repeat=2) if r * c <= 9}
  assert len(grids) == len(set(grids)) == 23


def grid_oracle(height, width, size, most):
  """All candidates, as the published code compares them: more kept wins, then less wasted."""
  best, kept, wasted = None, 0, float('inf')
  for rows, columns in candidate_grids(most):
    scale = min(columns * size / width, rows * size / height)
    inside = min(int(width * scale) * int(height * scale), width * height)
    waste = rows * columns * size * size - inside
    if inside > kept or (inside == kept and waste < wasted):
      best, kept, wasted = (rows, columns), inside, waste
  return best


@pytest.mark.parametrize('most', [1, 4, 9])
def test_the_best_grid(most):
  rng = np.random.default_rng(0)
  seen = set()
  for height, width in rng.integers(10, 3000, (200, 2)).tolist():
    found = best_grid(height, width, 384, most)
    assert found == grid_oracle(height, width, 384, most)
    seen.add(found)
  assert len(seen) > (0 if most == 1 else 4)
  assert best_grid(384, 384, 384) == (1, 1)
  assert best_grid(384, 1536, 384) == (1, 4)
  assert best_grid(1152, 1152, 384) == (3, 3)


def test_lines_end_with_a_newline():
  assert whole_layout(2, 5, NEWLINE).tolist() == [5, 6, NEWLINE, 7, 8, NEWLINE]


def test_layout_of_the_published_model():
  """14 · 15 + 1 + 14 h · (14 w + 1) places, see the class; lines go through all tiles abreast."""
  for rows, columns in candidate_grids(9):
    found = picture_layout((rows, columns), 14, (0, 196), NEWLINE, SEPARATOR)
    assert len(found) == 14 * 15 + 1 + 14 * rows * (14 * columns + 1)
    assert (found == NEWLINE).sum() == 14 + 14 * rows
    assert sorted(found[found >= 0]) == list(range(196 * (1 + rows * columns)))
  found = picture_layout((2, 3), 2, (0, 100), NEWLINE, SEPARATOR).tolist()
  assert found[:7] == [0, 1, NEWLINE, 2, 3, NEWLINE, SEPARATOR]
  assert found[7:14] == [100, 101, 104, 105, 108, 109, NEWLINE]
  assert found[14:21] == [102, 103, 106, 107, 110, 111, NEWLINE]
  assert found[21:28] == [112, 113, 116, 117, 120, 121, NEWLINE]
