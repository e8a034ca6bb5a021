"""The plan of a compiled training step against what is known of it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.pods import hlo
from deepseek_jax.pods.analytic import estimate_roughly
from deepseek_jax.pods.estimate import estimate, machine_of
from deepseek_jax.pods.kernels import KernelModel
from deepseek_jax.pods.memory import argument_class, bytes_by_class
from deepseek_jax.pods.report import describe
from deepseek_jax.pods.training import read_training, rows_filled


@pytest.fixture(scope='module')
def plan(training, small_slice):
  """The plan of the small step."""
  return read_training(training.program, small_slice, training.build, 'a command')


@pytest.fixture(scope='module')
def rough(training, small_slice):
  """What is estimated of it without compiling."""
  program = training.program
  machine = machine_of(small_slice, dict(program.mesh.shape), program.mesh.devices.reshape(-1))
  return estimate_roughly(program.experiment, machine)


def test_flops_are_those_that_were_estimated(plan, rough):
  """Microbatches, layers and recomputation counted: within 2 % of the compiled program's."""
  assert plan.flops == pytest.approx(rough.flops, rel=0.02)
  assert plan.model_flops == pytest.approx(rough.model_flops, rel=1e-9)
  phases = {part.phase for part in plan.parts}
  assert phases == {'forward', 'recompute', 'backward', 'update'}
  once = plan.facts["the compiler's FLOPs, loops once"]
  assert once < 0.5 * plan.flops, 'the compiler counts four layers and two microbatches once'


def test_state_is_what_the_compiled_program_is_given(training, plan, rough):
  """Bytes of parameters and optimizer on one device, within 1 %."""
  module = hlo.parse(training.build.text)
  found = dict.fromkeys(('parameters', 'optimizer'), 0)
  for instruction in module.main.instructions:
    label = instruction.op_name
    if instruction.opcode == 'parameter' and argument_class(label) in found:
      found[argument_class(label)] += sum(array.bytes for array in instruction.arrays)
  for kind, size in found.items():
    assert size > 0
    assert rough.memory[kind] == pytest.approx(size, rel=0.01)
    assert plan.memory.by_class[kind] == pytest.approx(size, rel=0.01)


def test_work_grows_with_the_trips_of_its_loops(training, small_slice):
  """Twice the trips of the loop over microbatches: twice the work inside."""
  module = hlo.parse(training.build.text)
  program = training.program
  machine = machine_of(small_slice, dict(program.mesh.shape), program.mesh.devices.reshape(-1))
  model = KernelModel()
  before = estimate(module, machine, model)
  text = training.build.text
  assert '"known_trip_count":{"n":"2"}' in text
  doubled = hlo.parse(text.replace('"known_trip_count":{"n":"2"}', '"known_trip_count":{"n":"4"}'))
  after = estimate(doubled, machine, model)
  assert after.all_work.flops == pytest.approx(2 * before.all_work.flops, rel=0.02)
  assert not before.unknown_loops
  assert not before.unknown_kernels


def test_exchanges_go_along_the_axes_of_the_rules(plan):
  """Weights are gathered along `data`, and there is nothing along axes of one device."""
  axes = {axis for item in plan.traffic for axis in item.axes.split('·')}
  assert axes == {'data'}
  gathered = sum(t.bytes for t in plan.traffic if t.kind == 'all-gather')
  assert gathered > plan.memory.by_class['parameters']


def test_time_is_the_sum_of_its_parts(plan):
  """What the core does and what it waits for."""
  parts = sum(plan.time.busy_seconds.values()) + sum(plan.time.exposed_seconds.values())
  assert plan.time.step_seconds == pytest.approx(parts, rel=1e-6)
  assert 0 < plan.mfu < 1


def test_the_last_line_is_a_verdict(plan):
  """Of a plan that fits, and of one that does not."""
  assert describe(plan).splitlines()[-1].startswith('fits: 31.2 GiB to spare')
  memory = dataclasses.replace(plan.memory, usable_bytes=2**20)
  last = describe(dataclasses.replace(plan, memory=memory)).splitlines()[-1]
  assert last.startswith('does not fit: 0.0 GiB over because of ')
  assert '; try ' in last


def test_rows_that_are_somebodys(shrink):
  """Of room for twice the even share, half; of room for everything, one shard's part."""
  sizes = {'expert': 4}
  for dispatch, share in ((AllToAll(bound=2.0), 0.5), (AllToAll(), 0.25)):
    experiment = shrink(**{'model.dense_layers': 1, 'model.feed_forward.dispatch': dispatch})
    assert rows_filled(experiment, sizes) == share
  assert rows_filled(shrink(), sizes) == 1.0
  assert rows_filled(experiment, {'expert': 1}) == 1.0


def test_bytes_of_a_state(training):
  """From shapes and shardings alone."""
  state = training.program.abstract_state
  whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
  found = bytes_by_class(state)
  assert found['parameters'] < whole
  assert found['optimizer'] == pytest.approx(2 * found['parameters'], rel=0.01)
  assert jnp.dtype(jnp.float32).itemsize == 4
