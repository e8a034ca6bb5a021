"""Replicas that add up gradients of their own take the step of one device, and what bits change.

What is compared with one device: loss, gradient norm, both moments of Adam, the updated parameters,
loads and selection biases, of rows with very unequal counts of targets. Why the optimizer has so
large an ε is said in `test_sharded.py`.
"""

import dataclasses
import functools
import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import tiny_mla
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.tree import flatten
from deepseek_jax.data.batch import Batch
from deepseek_jax.layers.moe.balance import SequenceBalance
from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.optim.balance import update_buffers
from deepseek_jax.optim.compression import Every, Exact, LocalSteps, Quantised
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import Constant
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import EXPERT, FSDP, TENSOR
from deepseek_jax.sharding.traffic import read_collectives
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.gradients import Given, Own, make_part_gradients
from deepseek_jax.train.objective import batch_totals
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.step import Program, build_program

ROWS, LENGTH = 8, 16
TOLERANCE = 1e-5
BLOCK = 16

LAYOUTS = {
  'single': (FSDP, MeshConfig(data=1)),
  'hybrid': (FSDP, MeshConfig(replica=2, data=4)),
  'replicas': (FSDP, MeshConfig(replica=4, data=1)),
  'expert': (EXPERT, MeshConfig(replica=2, data=2, expert=2)),
  'tensor': (TENSOR, MeshConfig(replica=2, data=2, model=2)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
  """Steps against the gradient."""

  peak_lr: float = 0.02

  def build(self, schedule_fn, axes):
    """An optimizer in form."""
    del axes
    return optax.sgd(lambda step: self.peak_lr * schedule_fn(step))


def experiment(layout: str, reduction: Any, microbatches: int = 1) -> Experiment:
  """Two layers of experts in one scan, with a balance loss that is heavy enough to show."""
  base = tiny_mla.get_config()
  sparse = dataclasses.replace(base.model.feed_forward, balance=SequenceBalance(weight=0.1))
  if layout == 'expert':
    sparse = dataclasses.replace(sparse, dispatch=AllToAll())
  rules, mesh = LAYOUTS[layout]
  return dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, depth=2, dense_layers=0, mtp=None, feed_forward=sparse),
    data=dataclasses.replace(base.data, length=LENGTH, batch_size=ROWS),
    optimizer=Plain() if isinstance(reduction, LocalSteps) else AdamW(peak_lr=1e-2, epsilon=1e-2),
    schedule=Constant(),
    rules=rules,
    mesh=mesh,
    reduction=reduction,
    microbatches=microbatches,
  )


@functools.cache
def program(layout: str, reduction: Any, microbatches: int = 1) -> tuple[Program, Any]:
  """The program of an experiment and its compiled step."""
  chosen = experiment(layout, reduction, microbatches)
  devices = math.prod(size or 1 for size in dataclasses.asdict(chosen.mesh).values())
  made = build_program(chosen, jax.devices()[:devices])
  return made, made.step.compile(made.abstract_state, made.abstract_batch())


def start(made: Program) -> TrainState:
  """The same made-up state for every layout; nothing is carried yet."""
  generator = np.random.default_rng(0)
  draw = lambda leaf: generator.normal(0.1, 0.3, leaf.shape).astype(np.float32)  # noqa: E731
  abstract = made.abstract_state
  state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
  params, buffers = (jax.tree.map(draw, tree) for tree in (state.params, state.buffers))
  state = state.replace(params=params, buffers=buffers)
  kind = made.experiment.reduction
  if isinstance(kind, LocalSteps):
    state = state.replace(carry={**state.carry, 'interval': np.int32(kind.interval.steps)})
  return put(made, state)


def put(made: Program, state: Any) -> TrainState:
  """Lays a state on the devices."""
  return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, made.abstract_state))


def packed(seed: int) -> Batch:
  """Rows of documents; the second half of them has a third of the targets of the first."""
  generator = np.random.default_rng(seed)
  shape = (ROWS, LENGTH)
  tokens, targets = (generator.integers(3, 259, shape).astype(np.int32) for _ in range(2))
  segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  documents = [(16,), (9, 7), (2, 5, 9), (15,), (), (3, 1), (7,), (5, 5)]
  for row, lengths in enumerate(documents):
    ends = np.cumsum([0, *lengths])
    for number, (begin, end) in enumerate(itertools.pairwise(ends), start=1):
      segments[row, begin:end] = number
      positions[row, begin:end] = np.arange(end - begin)
  real = segments > 0
  weights = real.astype(np.float32)
  return Batch(
    tokens * real, targets * real, weights, positions, segments, np.where(real, segments, -1)
  )


@functools.cache
def run(layout: str, reduction: Any, microbatches: int = 1, steps: int = 2) -> list[Any]:
  """State and metrics after each step, on the host."""
  made, step = program(layout, reduction, microbatches)
  state, results = start(made), []
  for seed in range(1, steps + 1):
    state, metrics = step(state, jax.device_put(packed(seed), made.batch_sharding))
    results.append(jax.device_get((state, metrics)))
  return results


def assert_same(found: Any, expected: Any, tolerance: float = TOLERANCE, where: str = '') -> None:
  """Every array within the tolerance, relative to the largest entry of the array."""
  found, expected = flatten(found), flatten(expected)
  assert found.keys() == expected.keys()
  for address, array in expected.items():
    limit = tolerance * np.abs(array).max()
    assert limit > 0, f'{where}{address} is all zero'
    difference = np.abs(found[address] - array).max()
    assert difference <= limit, f'{where}{address} differs by {difference}, limit {limit}'


CASES = [('hybrid', 1), ('hybrid', 2), ('expert', 1), ('tensor', 1), ('replicas', 1)]


@pytest.mark.slow
@pytest.mark.parametrize(('layout', 'microbatches'), CASES)
def test_exact_changes_nothing(layout, microbatches):
  """Two steps of replicas with gradients of their own are those of one device."""
  counts = packed(1).weights.reshape(2, -1).sum(axis=1)
  assert counts[0] > 2 * counts[1]
  pairs = zip(run(layout, Exact(), microbatches), run('single', None), strict=True)
  for (state, metrics), (state_1, metrics_1) in pairs:
    for name in ('loss', 'auxiliary_loss', 'grad_norm', 'tokens'):
      assert metrics[name] == pytest.approx(metrics_1[name], rel=TOLERANCE), name
    moments, moments_1 = state.opt_state[1], state_1.opt_state[1]
    assert_same(moments.mu, moments_1.mu)
    assert_same(moments.nu, moments_1.nu, 2 * TOLERANCE)
    assert_same(state.params, state_1.params)
    for address, load in flatten(metrics_1['observed']).items():
      np.testing.assert_array_equal(flatten(metrics['observed'])[address], load, err_msg=address)
    assert_same(state.buffers, state_1.buffers)
    assert state.carry == ()


@pytest.mark.parametrize('bits', [8, pytest.param(4, marks=pytest.mark.slow)])
def test_what_bits_change(bits):
  """The first step's gradient is off by no more than the half steps say, and the carry has it."""
  reduction = Quantised(bits=bits, block=BLOCK)
  (state, metrics), _ = run('hybrid', reduction)
  (exact, metrics_1), _ = run('hybrid', Exact())
  assert metrics['loss'] == pytest.approx(metrics_1['loss'], rel=1e-6)
  # Clipped alike: norms are compared too, and what is left of β₁ is the gradient.
  clip, clip_1 = (max(float(m['grad_norm']), 1.0) for m in (metrics, metrics_1))
  grads = {name: mu * 10 * clip for name, mu in flatten(state.opt_state[1].mu).items()}
  grads_1 = {name: mu * 10 * clip_1 for name, mu in flatten(exact.opt_state[1].mu).items()}
  carried = flatten(state.carry['error'])
  off = 0.0
  for address, wanted in grads_1.items():
    lost = carried[address].sum(axis=0)
    largest = np.abs(wanted).max() + np.abs(lost).max()
    np.testing.assert_allclose(grads[address] + lost, wanted, atol=3e-5 * largest, err_msg=address)
    off += float((lost**2).sum())
  total = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
  share = math.sqrt(off) / total
  # A uniform error in steps of the block's largest: at most 0.5 / 127, or 0.5 / 7, of that.
  assert 1e-4 < share < {8: 0.02, 4: 0.3}[bits]
  assert 0.3 * share < float(metrics['exchange_error']) < 3 * share


@pytest.mark.parametrize('reduction', [Exact(), Quantised(bits=8, block=BLOCK)])
def test_what_crosses(reduction):
  """In the compiled program: of sharded weights a device's own shard, and what the log says.

  Beside gradients cross the losses and the experts' loads, which every step adds up.
  """
  made, step = program('hybrid', reduction)
  found = read_collectives(step.function.as_text(), dict(made.mesh.shape))
  crossing = [collective for collective in found if 'replica' in collective.axes]
  sent = sum(collective.sent_bytes for collective in crossing)
  (_, metrics), _ = run('hybrid', reduction)
  rest = sent - float(metrics['exchanged_bytes'])
  assert 0 < rest < 1000
  shards = sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape))
    for leaf in jax.tree.leaves(made.abstract_state.params)
  )
  whole = sum(leaf.size for leaf in jax.tree.leaves(made.abstract_state.params))
  assert shards < 0.35 * whole
  if isinstance(reduction, Exact):
    assert sent - rest == 4 * shards
  else:
    assert sent - rest < 2 * shards
    large = [collective for collective in crossing if collective.payload > 1000]
    assert {dtype for collective in large for dtype in collective.dtypes} == {'u8'}
    assert {collective.axes for collective in large} == {('replica',)}


def names_in(text: str) -> list[str]:
  """The operands of an operation."""
  return re.findall(r'%([\w.\-]+)', re.split(r', (?:metadata|to_apply|calls|body)=', text)[0])


def needed(hlo: str, wanted: str) -> set[str]:
  """Where all comes from that the first collectives of a bucket wait for, by the entry's text.

  The compiler joins sums over devices of a slice into one: of that, only the own operand counts.
  """
  lines = {}
  for line in hlo[hlo.index('\nENTRY ') :].splitlines():
    match = re.match(r'\s+(?:ROOT )?%?([\w.\-]+) = (.*)', line)
    if match:
      lines[match[1]] = match[2]
  names = {name: re.search(r'op_name="([^"]*)"', text) for name, text in lines.items()}
  origin = {name: found[1] if found else '' for name, found in names.items()}
  waiting = [
    name for name in lines if f'exchange/{wanted}/' in origin[name] and 'all_to_all' in origin[name]
  ]
  assert waiting, wanted
  seen = set(waiting)
  while waiting:
    text = lines[waiting.pop()]
    operands = names_in(text)
    place = re.search(r'get-tuple-element\(.*\), index=(\d+)', text)
    if place and ' all-reduce(' in lines[operands[0]]:
      operands = [names_in(lines[operands[0]])[int(place[1])]]
    for name in operands:
      if name in lines and name not in seen:
        seen.add(name)
        waiting.append(name)
  return {origin[name] for name in seen}


def test_late_parts_need_not_wait_for_early_ones():
  """The message of the head needs nothing of the layers' backward pass; that of the layers does."""
  _, step = program('hybrid', Quantised(bits=8, block=BLOCK))
  hlo = step.function.as_text()
  backward = lambda names: [n for n in names if 'transpose(' in n and '/stack/' in n]  # noqa: E731
  assert not backward(needed(hlo, 'head'))
  assert backward(needed(hlo, 'stack/segment_0'))
  assert backward(needed(hlo, 'embedding'))


def test_it_is_deterministic_and_goes_on_bitwise():
  """The same steps again, and again from the state of the first, give the same bits."""
  reduction = Quantised(bits=8, block=BLOCK)
  made, step = program('hybrid', reduction)
  (first, _), (second, _) = run('hybrid', reduction)
  state = put(made, first)
  state, _ = step(state, jax.device_put(packed(2), made.batch_sharding))
  for again, before in zip(jax.tree.leaves(jax.device_get(state)), jax.tree.leaves(second)):
    np.testing.assert_array_equal(again, before)


def test_replicas_keep_errors_of_their_own():
  """[R, ...] along `replica`, and each device those of its own shard."""
  made, _ = program('hybrid', Quantised(bits=8, block=BLOCK))
  (state, _), _ = run('hybrid', Quantised(bits=8, block=BLOCK))
  specs = {k: v.sharding.spec for k, v in flatten(made.abstract_state.params).items()}
  for address, leaf in flatten(made.abstract_state.carry['error']).items():
    assert leaf.shape == (2, *flatten(made.abstract_state.params)[address].shape)
    assert leaf.sharding.spec == jax.sharding.PartitionSpec('replica', *specs[address])
    error = flatten(state.carry['error'])[address]
    assert not np.array_equal(error[0], error[1]), address


def test_a_skipped_step_leaves_the_carry():
  """A fault in one replica's weights is seen by all; errors stay those of the step before."""
  reduction = Quantised(bits=8, block=BLOCK)
  made, step = program('hybrid', reduction)
  (first, _), _ = run('hybrid', reduction)
  broken = jax.tree.map(np.copy, first.params)
  broken['head']['weight'][0, 0] = np.inf
  state = put(made, first.replace(params=broken))
  state, metrics = jax.device_get(step(state, jax.device_put(packed(2), made.batch_sharding)))
  assert int(metrics['guard']['fault']) > 0
  assert int(state.guard.skipped) == 1
  for after, before in zip(jax.tree.leaves(state.carry), jax.tree.leaves(first.carry)):
    np.testing.assert_array_equal(after, before)
    assert np.isfinite(after).all()


def test_rules_that_leave_replicas_nothing_of_their_own():
  """Refused when the program is built."""
  chosen = experiment('hybrid', Exact())
  wrong = dataclasses.replace(FSDP, batch=('data', 'replica'), embed=('replica',))
  with pytest.raises(ConfigError) as caught:
    build_program(dataclasses.replace(chosen, rules=wrong))
  assert any('expected `replica` first' in message for message in caught.value.messages)
  assert any('rules.embed' in message for message in caught.value.messages)


LOCAL = LocalSteps(interval=Every(steps=2), outer_rate=0.5, momentum=0.5)


@functools.cache
def alone():
  """Two replicas that step by themselves on one device, for four batches: weights by hand."""
  chosen = experiment('single', LOCAL)
  chosen = dataclasses.replace(chosen, rules=FSDP)
  made = build_program(dataclasses.replace(chosen, reduction=None), jax.devices()[:1])
  gradients = jax.jit(make_part_gradients(chosen, made.decoder))
  rate, params, momentum, seen = Plain().peak_lr, jax.device_get(start(made).params), None, []
  buffers = jax.device_get(start(made).buffers)
  states = [params, params]
  for seed in range(1, 5):
    batch = packed(seed)
    totals, found, loads = batch_totals(batch, 0), [], []
    for number, weights in enumerate(states):
      rows = jax.tree.map(lambda x: x[4 * number : 4 * number + 4], batch)  # noqa: B023
      given = Given(weights, buffers, jnp.int32(seed - 1), totals.targets, jnp.float32(0.3), None)
      (grads, _), _, observed = gradients(given, Own(rows, jax.random.key(0)))
      found.append(jax.tree.map(lambda w, g: w - rate * 2 * np.asarray(g), weights, grads))
      loads.append(observed)
    states = found
    buffers = follow(made, buffers, jax.tree.map(jnp.add, *loads))
    if seed % 2 == 0:
      moved = jax.tree.map(lambda a, b, c: (a + b) / 2 - c, *states, params)
      momentum = jax.tree.map(lambda m: 0 * m, moved) if momentum is None else momentum
      momentum = jax.tree.map(lambda m, x: 0.5 * m + x, momentum, moved)
      params = jax.tree.map(lambda w, x, m: w + 0.5 * (x + 0.5 * m), params, moved, momentum)
      states = [params, params]
    seen.append((params, states))
  return seen


def follow(made: Program, buffers: Any, loads: Any) -> Any:
  """Selection biases after a step."""
  balance = made.experiment.balance
  return jax.device_get(
    update_buffers(buffers, loads, balance.build(20)(jnp.int32(0)), balance.direction)
  )


def test_local_steps_are_those_of_replicas_alone():
  """Weights in common move when it is due and by what the rule says; each replica's in between."""
  found = run('hybrid', LOCAL, steps=4)
  for number, ((state, metrics), (params, states)) in enumerate(zip(found, alone(), strict=True)):
    assert_same(state.params, params, where=f'after step {number + 1}: ')
    for replica, weights in enumerate(states):
      moved = jax.tree.map(lambda x: x[replica], state.carry['moved'])  # noqa: B023
      own = jax.tree.map(np.add, state.params, moved)
      assert_same(own, weights, where=f'replica {replica} after step {number + 1}: ')
    assert int(state.carry['since']) == (number + 1) % 2
    assert float(metrics['local_steps']) == 1 + number % 2
    assert (float(metrics['exchanged_bytes']) > 0) == (number % 2 == 1)
