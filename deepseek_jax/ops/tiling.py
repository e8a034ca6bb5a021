"""Large pictures as a whole and as tiles: which grid of tiles, and where their embeddings stand."""

import numpy as np


def candidate_grids(most: int = 9) -> list[tuple[int, int]]:
  """Returns the grids (rows, columns) of tiles that a picture may be cut into.

  Args:
    most: largest number of tiles.
  """
  sides = range(1, most + 1)
  return [(rows, columns) for columns in sides for rows in sides if rows * columns <= most]


def best_grid(height: int, width: int, size: int, most: int = 9) -> tuple[int, int]:
  """Chooses the grid of tiles that keeps most of a picture's pixels, then wastes least.

  Args:
    height: pixels of the picture from top to bottom.
    width: pixels of the picture from left to right.
    size: pixels of a side of a tile.
    most: largest number of tiles.

  Returns:
    (rows, columns).

  Source: DeepSeek-VL2, arXiv 2412.10302, section 2 (dynamic tiling).
  """

  def worth(grid: tuple[int, int]) -> tuple[int, int]:
    high, wide = grid[0] * size, grid[1] * size
    scale = min(high / height, wide / width)
    # The picture is never made larger than it is: what it has is all that can be kept.
    kept = min(int(height * scale) * int(width * scale), height * width)
    return kept, kept - high * wide

  return max(candidate_grids(most), key=worth)


def whole_layout(side: int, start: int, newline: int) -> np.ndarray:
  """Returns what stands where a whole picture is: its embeddings, a newline after every row.

  Args:
    side: embeddings of a side of the square picture.
    start: number of its first embedding in the row.
    newline: what a newline is written as.

  Returns:
    [side · (side + 1)] int32 placeholders.
  """
  return tiles_layout((1, 1), side, start, newline)


def tiles_layout(grid: tuple[int, int], side: int, start: int, newline: int) -> np.ndarray:
  """Returns what stands where the tiles of a picture are, row by row through all tiles abreast.

  Args:
    grid: (rows, columns) of tiles, which are numbered row by row.
    side: embeddings of a side of a tile.
    start: number of the first tile's first embedding in the row.
    newline: what a newline is written as.

  Returns:
    [rows · side · (columns · side + 1)] int32 placeholders.
  """
  rows, columns = grid
  numbers = np.arange(rows * columns * side * side).reshape(rows, columns, side, side)
  lines = start + numbers.transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
  return np.pad(lines, ((0, 0), (0, 1)), constant_values=newline).reshape(-1).astype(np.int32)


def picture_layout(
  grid: tuple[int, int],
  side: int,
  starts: tuple[int, int],
  newline: int,
  separator: int,
) -> np.ndarray:
  """Returns the places of a picture that is seen as a whole and then in tiles.

  Args:
    grid: (rows, columns) of tiles.
    side: embeddings of a side of a view.
    starts: number of the first embedding of the whole picture, and of its first tile.
    newline: what a newline is written as.
    separator: what stands between the two.

  Returns:
    [side · (side + 1) + 1 + rows · side · (columns · side + 1)] int32 placeholders.

  Source: DeepSeek-VL2, arXiv 2412.10302, section 2; its 2-D tile tag with the whole first.
  """
  whole = whole_layout(side, starts[0], newline)
  tiles = tiles_layout(grid, side, starts[1], newline)
  return np.concatenate([whole, [separator], tiles]).astype(np.int32)
