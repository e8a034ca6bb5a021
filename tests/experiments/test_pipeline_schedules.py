"""The pipeline of two processes: that it runs, and learns what one process learns."""

import itertools

import pytest

from deepseek_jax.pods.schedule.units import model_units
from experiments.pipeline_schedules import measure, model, plot


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one():
  units = len(model_units(model.experiment(tiny=True)))
  pipeline = measure.Pipeline(((0, 3), (3, units)), [4], tiny=True)
  try:
    found = measure.run_kinds(pipeline, 4, rounds=1)
  finally:
    pipeline.close()
  assert {row['kind'] for row in found} == set(plot.KINDS)
  for row in found:
    assert row['gradient_error']['worst'] < 1e-5, row['kind']
    assert all(0 <= share < 1 for shares in row['idle'] for share in shares)
    measured, predicted = plot.timelines_of(row)
    assert measured.plan.orders == predicted.plan.orders
    assert predicted.makespan == pytest.approx(row['predicted_seconds'])
    for mine in measured.by_device():
      assert all(a.end <= b.start for a, b in itertools.pairwise(mine))
