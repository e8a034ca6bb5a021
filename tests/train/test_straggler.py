"""Who is slow, from a few numbers."""

from deepseek_jax.train.straggler import Probe, find_stragglers


def test_equal_processes_are_not_named():
  assert find_stragglers([1.0, 1.1, 0.95, 1.2], [0.01] * 4, 1.0) == {}
  assert find_stragglers([1.0], [0.5], 1.0) == {}


def test_slow_devices_and_slow_data_are_named():
  found = find_stragglers([1.0, 1.0, 2.0, 1.05], [0.01, 0.3, 0.01, 0.02], 1.0)
  assert set(found) == {1, 2}
  assert 'reads data for 0.300 s' in found[1]
  assert '2.00 times as long' in found[2]
  # Of two, and where one is quick, the slow one is named and not the other.
  assert set(find_stragglers([1.0, 2.0], [0, 0], 1.0)) == {1}
  assert find_stragglers([0.5, 1.0, 1.0, 1.0], [0, 0, 0, 0], 1.0) == {}


def test_the_probe_takes_about_as_long_as_it_should():
  probe = Probe(seconds=0.05)
  spent = min(probe.seconds() for _ in range(5))
  assert 0.005 < spent < 1.0
