"""The pipeline of two processes: what is committed of it, and that it still runs."""

import itertools
import statistics

import pytest

from deepseek_jax.pods.schedule.units import model_units
from experiments.pipeline_schedules import measure, model, plot


@pytest.fixture(scope='module')
def rows():
  """What was measured."""
  return plot.read_rows()


def test_predictions_are_those_of_the_simulator(rows):
  assert {row['kind'] for row in rows} == set(plot.KINDS)
  for row in rows:
    measured, predicted = plot.timelines_of(row)
    assert predicted.makespan == pytest.approx(row['predicted_seconds'])
    assert predicted.bubbles == pytest.approx(row['predicted_idle'])
    # The median step that is drawn is one of those that were timed, in the order that was asked.
    assert any(measured.makespan == pytest.approx(seconds) for seconds in row['seconds'])
    assert measured.plan.orders == predicted.plan.orders
    means = [statistics.mean(shares) for shares in row['idle']]
    assert row['median_idle'] == pytest.approx(statistics.median(means))


def test_gradients_were_those_of_one_process(rows):
  assert max(row['gradient_error']['worst'] for row in rows) < 1e-5


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one():
  units = len(model_units(model.experiment(tiny=True)))
  pipeline = measure.Pipeline(((0, 3), (3, units)), [4], tiny=True)
  try:
    found = measure.run_kinds(pipeline, 4, rounds=1)
  finally:
    pipeline.close()
  for row in found:
    assert row['gradient_error']['worst'] < 1e-5, row['kind']
    assert all(0 <= share < 1 for shares in row['idle'] for share in shares)
    measured, _ = plot.timelines_of(row)
    for mine in measured.by_device():
      assert all(a.end <= b.start for a, b in itertools.pairwise(mine))
