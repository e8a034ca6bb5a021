"""The rhythm of a gathering; several processes gather in tests/processes."""

import numpy as np

from deepseek_jax.train.pulse import Pulse


def test_what_is_sent_is_received_once():
  pulse = Pulse(width=3)
  assert pulse.receive() is None
  pulse.send(1, [1.0, 2.0, 0.5])
  np.testing.assert_array_equal(pulse.receive(), [[1.0, 2.0, 0.5]])
  assert pulse.receive() is None


def test_it_is_due_about_once_a_second():
  pulse = Pulse(width=1, seconds=1.0)
  assert pulse.due(1)
  pulse.send(1, [0.0])
  # Nothing is known of the pace yet.
  assert pulse.due(2)
  pulse.pace(2, 0.1)
  assert not pulse.due(11)
  assert pulse.due(12)
  # Steps of many seconds: after each.
  pulse.pace(12, 30.0)
  assert pulse.due(13)
  pulse.pace(13, 0.0)
  assert pulse.due(14)
