"""Where media are in their rows, against loops over placeholders."""

import jax.numpy as jnp
import numpy as np

from deepseek_jax.ops.placeholders import LATE, media_places


def test_places():
  """Two media of 3 embeddings and one of 2; a placeholder of each, or all, or none."""
  spans = [(2, 3), (1, 2)]
  placeholders = np.array(
    [[-1, 0, 1, 2, -1, 6, -1, -2, 4, -1], [7, 6, -1, -1, -1, -1, -1, -1, -1, -1]], np.int32
  )
  positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4], list(range(10))], np.int32)
  segments = np.array([[1] * 5 + [2] * 5, [1] * 8 + [0] * 2], np.int32)
  found = media_places(*(jnp.asarray(x) for x in (placeholders, positions, segments)), spans)
  media = np.repeat([1, 2, 3], [3, 3, 2])
  for row in range(2):
    for s in range(8):
      at = [t for t in range(10) if placeholders[row, t] >= 0]
      at = [t for t in at if media[placeholders[row, t]] == media[s]]
      assert found.numbers[row, s] == media[s]
      assert found.first[row, s] == min((positions[row, t] for t in at), default=LATE)
      assert found.last[row, s] == max((positions[row, t] for t in at), default=-1)
      assert found.segments[row, s] == max((segments[row, t] for t in at), default=0)
