"""The step, piece by piece, on one device; that a mesh changes nothing is in tests/parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import tiny_mla
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.precision import BFloat16
from deepseek_jax.core.tree import flatten
from deepseek_jax.data.batch import Batch
from deepseek_jax.layers.moe.router.sigmoid import SigmoidRouter
from deepseek_jax.optim.balance import SignBias, update_bias
from deepseek_jax.optim.optimizer import Muon
from deepseek_jax.optim.schedule import Constant, MultiStep, WarmupStableDecay
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import TENSOR
from deepseek_jax.train.gradients import split_rows
from deepseek_jax.train.objective import NextToken, batch_context
from deepseek_jax.train.step import build_program

ROWS, LENGTH, RATE = 4, 16, 0.05
FIRST_STEP_ONLY = MultiStep(warmup_steps=0, boundaries=(0.25,), factor=0.0)


def experiment():
  """A run of four steps; MTP's weight and the bias's rate are zero after the first of them."""
  base = tiny_mla.get_config()
  return dataclasses.replace(
    base,
    # Two layers, so that none is scanned and routers can be looked into; no balance loss, so that
    # MTP modules learn from their own loss alone.
    model=dataclasses.replace(
      base.model,
      depth=2,
      feed_forward=dataclasses.replace(base.model.feed_forward, balance=None),
    ),
    optimizer=dataclasses.replace(base.optimizer, clip_norm=0.5),
    data=dataclasses.replace(base.data, length=LENGTH, batch_size=ROWS),
    schedule=WarmupStableDecay(warmup_steps=1),
    train_steps=4,
    objective=NextToken(mtp_schedule=FIRST_STEP_ONLY),
    balance=SignBias(rate=RATE, schedule=FIRST_STEP_ONLY),
  )


def packed() -> Batch:
  """Four rows; the last third of the last is padding."""
  generator = np.random.default_rng(0)
  tokens, targets = (generator.integers(3, 259, (ROWS, LENGTH)).astype(np.int32) for _ in range(2))
  segments = np.ones((ROWS, LENGTH), np.int32)
  segments[-1, 10:] = 0
  positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), segments.shape) * segments
  weights = segments.astype(np.float32)
  return Batch(tokens * segments, targets * segments, weights, positions, segments, segments - 1)


@pytest.fixture(scope='module')
def program():
  """The functions of the run on one device."""
  return build_program(experiment(), jax.devices()[:1])


@pytest.fixture(scope='module')
def steps(program):
  """(state, metrics) before and after each of two steps, on the host; and the donated state."""
  generator = np.random.default_rng(1)
  draw = lambda leaf: generator.normal(0, 0.3, leaf.shape).astype(np.float32)  # noqa: E731
  state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), program.abstract_state)
  state = state.replace(
    params=jax.tree.map(draw, state.params), buffers=jax.tree.map(draw, state.buffers)
  )
  results = [(state, None)]
  state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, program.abstract_state))
  donated = state
  step = program.step.compile(program.abstract_state, program.abstract_batch())
  for _ in range(2):
    state, metrics = step(state, jax.device_put(packed(), program.batch_sharding))
    results.append(jax.device_get((state, metrics)))
  return results, donated


def test_steps_count_up(steps):
  """The state counts finished steps, as an integer."""
  assert [int(state.step) for state, _ in steps[0]] == [0, 1, 2]
  assert steps[0][-1][0].step.dtype == np.int32


def test_the_state_is_donated(steps):
  """Its memory is the new state's: there is never room for two."""
  leaves = jax.tree.leaves(steps[1])
  assert len(leaves) > 100
  assert all(leaf.is_deleted() for leaf in leaves)


def test_metrics(steps):
  """What every step reports: the learning rate is that of this step, not of the next."""
  (_, first), (_, second) = steps[0][1:]
  assert set(first) == {
    'loss', 'mtp_loss', 'auxiliary_loss', 'grad_norm', 'learning_rate', 'tokens', 'observed',
    'buffers', 'skipped_steps', 'guard',
  }  # fmt: skip
  assert first['tokens'] == 3 * LENGTH + 10
  assert first['learning_rate'] == pytest.approx(1e-2 / 2)
  assert second['learning_rate'] == pytest.approx(1e-2)


def test_weights_follow_the_optimizer(program, steps):
  """The update is the optimizer's, from the gradient that its first moment holds."""
  (before, _), (after, metrics) = steps[0][:2]
  optimizer = experiment().optimizer
  gradients = jax.tree.map(lambda mean: mean / (1 - optimizer.beta1), after.opt_state[1].mu)
  # Clipped to a norm of a half; the reported norm is from before.
  assert metrics['grad_norm'] > 0.6
  assert float(optax.tree.norm(gradients)) == pytest.approx(0.5, rel=1e-5)
  rule = optimizer.build(experiment().schedule.build(4), program.axes)

  def apply(gradients, params):
    updates, _ = rule.update(gradients, rule.init(params), params)
    return optax.apply_updates(params, updates)

  arguments = (gradients, before.params)
  expected = flatten(jax.jit(apply).lower(*arguments).compile()(*arguments))
  for address, leaf in flatten(after.params).items():
    np.testing.assert_allclose(leaf, expected[address], atol=1e-6, err_msg=address)
    assert np.any(leaf != flatten(before.params)[address]), address


def test_bias_follows_the_loads(program, steps):
  """Loads counted by hand from what the routers chose, and the rule applied to them."""
  (before, _), (after, metrics) = steps[0][:2]
  batch = packed()

  def routes(variables):
    def forward(module, context):
      return module.every_depth(context)

    context = batch_context(jax.tree.map(jnp.asarray, batch), experiment().rules)
    _, seen = program.decoder.apply(
      variables,
      context,
      method=forward,
      mutable=['intermediates'],
      capture_intermediates=lambda module, method: (
        isinstance(module, SigmoidRouter) and method == '__call__'
      ),
    )
    return seen['intermediates']

  variables = {'params': before.params, 'buffers': before.buffers}
  seen = jax.jit(routes).lower(variables).compile()(variables)
  old, new, loads = (flatten(tree) for tree in (before.buffers, after.buffers, metrics['observed']))
  routers = {
    address.removesuffix('/__call__'): value[0] for address, value in flatten(seen).items()
  }
  assert len(routers) == len(old) == 2
  real = batch.segments.reshape(-1) > 0
  for address, assignment in routers.items():
    chosen = np.asarray(assignment.experts)[real]
    assert chosen.shape == (real.sum(), 2)
    load = np.bincount(chosen.reshape(-1), minlength=8)
    assert len(set(load)) > 1
    np.testing.assert_array_equal(loads[f'{address}/load'], load)
    bias = f'{address}/selection_bias'
    expected = old[bias] + RATE * np.sign(load.mean() - load)
    np.testing.assert_allclose(new[bias], expected, rtol=1e-6)
    np.testing.assert_array_equal(new[bias], update_bias(old[bias], jnp.float32(load), RATE))
    np.testing.assert_array_equal(flatten(metrics['buffers'])[bias], new[bias])


def test_nothing_else_moves_the_bias(steps):
  """In the second step the rule's rate is zero: gradients, decay and clipping leave it alone."""
  (_, _), (first, _), (second, metrics) = steps[0]
  assert np.any(flatten(metrics['observed'])['mtp_0/block/feed_forward/router/load'])
  jax.tree.map(np.testing.assert_array_equal, first.buffers, second.buffers)


def test_weight_of_mtp_follows_its_schedule(steps):
  """In the second step it is zero: modules that only MTP uses get no gradient."""
  (_, _), (first, _), (second, metrics) = steps[0]
  beta = experiment().optimizer.beta1
  one, two = (flatten(state.opt_state[1].mu) for state in (first, second))
  assert metrics['mtp_loss'] > 1
  for address in ('mtp_0/join', 'mtp_0/block/attention/output', 'mtp_0/norm/scale'):
    assert np.any(one[address])
    np.testing.assert_allclose(two[address], beta * one[address], rtol=1e-6)
  address = 'stack/segment_0/block_0/attention/output'
  assert np.abs(two[address] - beta * one[address]).max() > 1e-3 * np.abs(one[address]).max()


def test_evaluation(program, steps):
  """The evaluation's nats over its targets are the loss that the step reports."""
  before, metrics = steps[0][0][0], steps[0][1][1]
  batch = jax.device_put(packed(), program.batch_sharding)
  compiled = program.evaluate.compile(before.params, before.buffers, batch)
  sums = compiled(before.params, before.buffers, batch)
  assert float(sums['targets']) == 3 * LENGTH + 10
  assert float(sums['nats'] / sums['targets']) == pytest.approx(float(metrics['loss']), rel=1e-5)


def test_without_a_rule_the_bias_stays():
  """`balance=None` is a model like any other; nothing needs its loads."""
  run = dataclasses.replace(experiment(), balance=None, schedule=Constant())
  program = build_program(run, jax.devices()[:1])
  state, metrics = program.step.shapes(program.abstract_state, program.abstract_batch())
  assert jax.tree.structure(state) == jax.tree.structure(program.abstract_state)
  assert 'observed' in metrics


def test_split_rows():
  """Part j has the rows j, j + parts, …: neighbours on one device go to different parts."""
  batch = packed()
  parts = split_rows(batch, 2)
  names = [name for name, field in vars(batch).items() if field is not None]
  assert len(names) == 6
  for name in names:
    whole, cut = getattr(batch, name), getattr(parts, name)
    assert cut.shape == (2, 2, LENGTH)
    np.testing.assert_array_equal(cut[0], whole[[0, 2]])
    np.testing.assert_array_equal(cut[1], whole[[1, 3]])


def test_parameters_stay_float32():
  """Whatever the compute dtype, the state that training adds up in keeps its precision."""
  program = build_program(
    dataclasses.replace(experiment(), precision=BFloat16()), jax.devices()[:1]
  )
  leaves = jax.tree.leaves((program.abstract_state.params, program.abstract_state.opt_state))
  assert {leaf.dtype.name for leaf in leaves} == {'float32', 'int32'}
  state, _ = program.step.shapes(program.abstract_state, program.abstract_batch())
  assert jax.tree.map(lambda leaf: leaf.dtype, state) == jax.tree.map(
    lambda leaf: leaf.dtype, program.abstract_state
  )


def test_abstract_batch(program):
  """The shapes that a step is compiled for are those of the data."""
  abstract, real = program.abstract_batch(), packed()
  names = [name for name, field in vars(real).items() if field is not None]
  assert [name for name, leaf in vars(abstract).items() if leaf is not None] == names
  for name in names:
    assert getattr(abstract, name).shape == getattr(real, name).shape
    assert getattr(abstract, name).dtype == getattr(real, name).dtype


def test_muon_lies_like_its_weights():
  """The moments of an optimizer in two halves find their parameters' layout."""
  run = dataclasses.replace(
    experiment(),
    optimizer=Muon(peak_lr=1e-2),
    rules=TENSOR,
    mesh=MeshConfig(data=2, model=4),
  )
  state = build_program(run).abstract_state
  expected = {address: leaf.sharding.spec for address, leaf in flatten(state.params).items()}
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
    address = jax.tree_util.keystr(path, simple=True, separator='/')
    match = next((a for a in expected if address.endswith(f'/{a}')), None)
    # 'norm/scale' is the end of longer addresses: the longest is the right one.
    for other in expected:
      if match and address.endswith(f'/{other}') and len(other) > len(match):
        match = other
    if match:
      found.setdefault(match, []).append(leaf.sharding.spec)
  assert found.keys() == expected.keys()
  for address, specs in found.items():
    assert set(specs) == {expected[address]}, address


def test_all_faults_at_once():
  """Building lists what is wrong between the parts before it looks at any weight."""
  run = experiment()
  wrong = dataclasses.replace(
    run,
    model=dataclasses.replace(run.model, vocab=10),
    data=dataclasses.replace(run.data, batch_size=6),
  )
  with pytest.raises(ConfigError) as caught:
    build_program(wrong)
  assert len(caught.value.messages) == 2
