"""Text is let through up to a stop text, and never part of one."""

import pytest

from deepseek_jax.infer.stop import StopBefore


@pytest.mark.parametrize(
  ('stops', 'pieces', 'shown', 'rest'),
  [
    ([], ['ab', 'c'], ['ab', 'c'], ''),
    (['xyz'], ['ax', 'y', 'b'], ['a', '', 'xyb'], ''),
    (['xyz'], ['ax', 'y'], ['a', ''], 'xy'),
    (['xyz'], ['ax', 'yz', 'b'], ['a', '', ''], ''),
    (['xyz'], ['axyzb', 'xyz'], ['a', ''], ''),
    (['yz', 'xy'], ['axyz'], ['a'], ''),
    (['aab'], ['aa', 'a', 'b'], ['', 'a', ''], ''),
    (['\n'], ['a', 'b\nc'], ['a', 'b'], ''),
  ],
)
def test_stop_before(stops, pieces, shown, rest):
  """Piece by piece, and what is left at the end."""
  stop = StopBefore(stops)
  assert [stop.push(piece) for piece in pieces] == shown
  assert stop.found == any(text in ''.join(pieces) for text in stops)
  assert stop.finish() == rest
