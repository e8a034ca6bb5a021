"""A training step compiled for a slice of TPUs; needs the extra `pods`."""

import os

import pytest

from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.pods.analytic import estimate_roughly, rough_machine
from deepseek_jax.pods.report import blame
from deepseek_jax.pods.topology import find_devices, parse_topology, prepare
from deepseek_jax.pods.training import plan_training
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import EXPERT

pytest.importorskip('libtpu', reason='pip install "deepseek_jax[pods]"')


@pytest.fixture(scope='module')
def slice_of_four():
  """Four chips and their devices."""
  prepare(os.environ)
  topology = parse_topology('v5p:2x2x1')
  return topology, find_devices(topology)


@pytest.mark.slow
def test_a_step_with_experts(shrink, slice_of_four):
  """Rows travel as many as they are; kernels are counted; FLOPs and state are as estimated."""
  topology, devices = slice_of_four
  changes = {
    'model.width': 512,
    'model.dense_layers': 1,
    'model.feed_forward.hidden': 512,
    'model.feed_forward.dispatch': AllToAll(bound=2.0),
    'data.length': 256,
    'microbatches': 2,
  }
  experiment = shrink(mesh=MeshConfig(data=2, expert=2), rules=EXPERT, **changes)
  plan = plan_training(experiment, topology, devices)
  assert plan.fits
  assert not plan.facts['kernels of unknown cost']
  assert not plan.facts['loops of unknown trips, counted once']
  assert plan.facts['FLOPs in kernels'] > 0.1 * plan.flops
  kinds = {(item.axes, item.kind) for item in plan.traffic}
  assert ('expert', 'ragged-all-to-all') in kinds
  rough = estimate_roughly(experiment, rough_machine(experiment, topology))
  assert plan.flops == pytest.approx(rough.flops, rel=0.05)
  for kind in ('parameters', 'optimizer'):
    assert plan.memory.by_class[kind] == pytest.approx(rough.memory[kind], rel=0.01)
  assert plan.time.slow_seconds >= plan.time.step_seconds
  assert plan.memory.largest[0].module != 'step'


@pytest.mark.slow
def test_a_step_that_is_too_large_is_planned_too(shrink, slice_of_four):
  """By how much, and because of what."""
  topology, devices = slice_of_four
  # No array may be as large as all of it: the compiler refuses that.
  changes = {'model.depth': 120, 'model.dense_layers': 120, 'model.width': 4096}
  changes |= {'model.dense.hidden': 16_384}
  plan = plan_training(shrink(mesh=MeshConfig(data=4), **changes), topology, devices)
  assert not plan.fits
  assert blame(plan) in ('parameters', 'optimizer', 'gradients')
