"""Placement planned from a log: what is even, what moves, what is too short."""

import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.lab.placement import placement_table, plan_placement

EVEN, HEAVY = [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]


def rows(*loads):
  """Rows of a log; some have no load."""
  logged = [{'step': 2 * n, 'load': {'layers/1': load}} for n, load in enumerate(loads)]
  return [{'step': 1}, *logged, {'step': 99, 'load': {}}]


def test_loads_that_stay():
  (layer,) = plan_placement(rows(*[HEAVY] * 7), devices=2, slots=6, window=2)
  assert layer.layer == 'layers/1'
  # In order: 0.8 against 0.2; two experts a device, so packing cannot do better.
  assert layer.in_order == pytest.approx(1.6)
  assert layer.packed == pytest.approx(1.6)
  # The heavy one has a replica on each device, one of the light ones too, and the rest is even.
  assert layer.replicated == pytest.approx(1.0)
  assert layer.ahead == layer.replicated


def test_loads_that_move_are_judged_by_the_next_window():
  """The heavy expert is another in every window: a plan of the last one is of no use."""
  loads = [np.roll(HEAVY, 2 * (n // 2)) for n in range(8)]
  (layer,) = plan_placement(rows(*loads), devices=4, slots=8, window=2)
  assert layer.replicated < 1.2
  assert layer.ahead > 1.4


def test_even_loads_and_the_table():
  both = [{'step': n, 'load': {'layers/1': EVEN, 'layers/2': HEAVY}} for n in range(4)]
  layers = plan_placement(both, devices=2, slots=4, window=2)
  assert layers[0].in_order == layers[0].ahead == 1
  lines = placement_table(layers).splitlines()
  assert [line.split()[0] for line in lines] == ['layer', 'layers/1', 'layers/2', 'mean']
  assert lines[-1].split()[1:] == ['1.300'] * 4


@pytest.mark.parametrize(
  ('numbers', 'message'),
  [
    ({'window': 3}, 'found 4 rows with a load, expected two windows of 3'),
    ({'devices': 3, 'slots': 6}, 'layers/1: 4 experts are not divisible by 3 devices'),
    ({'slots': 2}, 'layers/1: 2 slots do not hold 4 experts'),
  ],
)
def test_what_cannot_be_planned_is_said(numbers, message):
  with pytest.raises(ConfigError, match=message):
    plan_placement(rows(*[HEAVY] * 4), **{'devices': 2, 'slots': 6, 'window': 2, **numbers})
