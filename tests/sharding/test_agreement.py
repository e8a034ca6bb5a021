"""With one process, agreeing is doing; several are in tests/processes."""

import pytest

from deepseek_jax.sharding import agreement


def test_one_process_agrees_with_itself():
  assert agreement.alone()
  assert agreement.first()
  assert agreement.from_first(lambda: 3) == 3
  assert agreement.in_turn(lambda: [4]) == [4]
  assert agreement.gather('x') == ['x']
  agreement.leave()


def test_an_error_is_the_error():
  with pytest.raises(ZeroDivisionError):
    agreement.from_first(lambda: 1 // 0)


def test_an_error_that_cannot_travel_is_told_in_words():
  class LocalError(Exception):
    """Known here only."""

  told = agreement._portable(LocalError('no'))
  assert isinstance(told, agreement.PeerError)
  assert str(told) == 'LocalError: no'
  assert isinstance(agreement._portable(ValueError('x')), ValueError)
