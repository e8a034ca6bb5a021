"""A plan as text that is kept."""

import pytest

from deepseek_jax.pods.plan import from_json, to_json
from deepseek_jax.pods.training import read_training


def test_a_plan_comes_back_as_it_was(training, small_slice):
  """Every field."""
  plan = read_training(training.program, small_slice, training.build, 'a command')
  again = from_json(to_json(plan))
  assert again == plan
  assert again.mfu == plan.mfu
  assert again.command == 'a command'


@pytest.mark.parametrize('text', ['{}', '{"memory": 3}', '{"memory": {"largest": []}}'])
def test_what_is_no_plan_is_refused(text):
  """Rather than half read."""
  with pytest.raises(ValueError, match='no plan'):
    from_json(text)
