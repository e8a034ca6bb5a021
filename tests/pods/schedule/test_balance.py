"""Cuts of a model into chunks, against every cut there is."""

import itertools
import random

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.pods.schedule.balance import cut_evenly, cut_folded, cut_for_devices


def every_cut(costs, chunks):
  """Totals of the chunks of all cuts."""
  for inner in itertools.combinations(range(1, len(costs)), chunks - 1):
    ends = [0, *inner, len(costs)]
    yield [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize('seed', range(12))
def test_no_cut_is_better(seed):
  chance = random.Random(seed)
  costs = [chance.choice([0.0, 1.0, 2.5, chance.random()]) for _ in range(chance.randint(4, 10))]
  for chunks in range(1, len(costs) + 1):
    cut = cut_evenly(costs, chunks)
    found = [sum(costs[a:b]) for a, b in cut.bounds]
    assert cut.totals == pytest.approx(found)
    assert sum(cut.sizes) == len(costs)
    assert min(cut.sizes) >= 1
    best = min((max(totals), sum(t * t for t in totals)) for totals in every_cut(costs, chunks))
    least = min(max(totals) for totals in every_cut(costs, chunks))
    assert max(found) == pytest.approx(least)
    squares = min(
      sum(t * t for t in totals)
      for totals in every_cut(costs, chunks)
      if max(totals) <= best[0] * (1 + 1e-12)
    )
    assert sum(t * t for t in found) == pytest.approx(squares)
    assert cut.bound <= max(found) * (1 + 1e-12)


@pytest.mark.parametrize('seed', range(12))
def test_no_fold_is_better(seed):
  chance = random.Random(seed)
  costs = [chance.choice([0.0, 1.0, 2.5, chance.random()]) for _ in range(chance.randint(6, 10))]
  for chunks in (2, 4, 6):
    cut = cut_folded(costs, chunks)
    found = [sum(costs[a:b]) for a, b in cut.bounds]
    assert cut.totals == pytest.approx(found)
    assert (sum(cut.sizes), len(cut.sizes)) == (len(costs), chunks)
    assert min(cut.sizes) >= 1

    def dearest(totals):
      return max(a + b for a, b in zip(totals, totals[::-1], strict=True))

    least = min(map(dearest, every_cut(costs, chunks)))
    assert dearest(found) == pytest.approx(least)
    squares = min(
      sum(t * t for t in totals)
      for totals in every_cut(costs, chunks)
      if dearest(totals) <= least * (1 + 1e-9)
    )
    assert sum(t * t for t in found) == pytest.approx(squares)
  with pytest.raises(ConfigError, match='3 chunks to fold'):
    cut_folded(costs, 3)


@pytest.mark.parametrize('seed', range(6))
def test_a_search_for_devices(seed):
  chance = random.Random(seed)
  costs = [chance.choice([1.0, 2.5, chance.random()]) for _ in range(9)]
  devices = [0, 1, 2] * 2

  def dearest(totals):
    return max(totals[d] + totals[d + 3] for d in range(3))

  cut, even = cut_for_devices(costs, devices), cut_evenly(costs, 6)
  assert cut.totals == pytest.approx([sum(costs[a:b]) for a, b in cut.bounds])
  assert sum(cut.sizes) == 9
  best = min(map(dearest, every_cut(costs, 6)))
  assert best * (1 - 1e-9) <= dearest(cut.totals) <= dearest(even.totals) * (1 + 1e-9)
  # A dear end is made good by a cheap chunk elsewhere on its device.
  tail = cut_for_devices([1.0] * 8 + [4.0], [0, 1] * 2)
  assert dearest_of_two(tail.totals) == 6.0
  assert dearest_of_two(cut_evenly([1.0] * 8 + [4.0], 4).totals) > 6.0


def dearest_of_two(totals):
  return max(totals[0] + totals[2], totals[1] + totals[3])


def test_figures_of_a_cut():
  cut = cut_evenly([3.0, 1.0, 1.0, 1.0, 4.0], 3)
  assert cut.sizes == (1, 3, 1)
  assert cut.totals == (3.0, 3.0, 4.0)
  assert cut.bounds == ((0, 1), (1, 4), (4, 5))
  assert cut.spread == pytest.approx(0.3)
  assert cut.excess == pytest.approx(0.2)
  assert cut.bound == 4.0
  assert cut_evenly([1.0] * 6, 4).bound == 1.5


def test_more_chunks_than_units_are_refused():
  for chunks in (0, 3):
    with pytest.raises(ConfigError, match=f'2 units to cut.*: {chunks}'):
      cut_evenly([1.0, 2.0], chunks)
