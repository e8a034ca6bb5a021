"""Experts that are born, break and come back, in training steps of a tiny model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.core.loss_scale import BackOff
from deepseek_jax.core.override import override
from deepseek_jax.core.precision import Float16
from deepseek_jax.core.tree import flatten, unflatten
from deepseek_jax.data.batch import Batch
from deepseek_jax.layers.moe.breaker import Breaker
from deepseek_jax.layers.moe.experts import SharedFactor
from deepseek_jax.layers.moe.growth import Growth
from deepseek_jax.models.decoder import canonical, grouped, plan_segments
from deepseek_jax.models.remat import EveryLayer
from deepseek_jax.ops.breaker import CLOSED, HALF_OPEN, OPEN
from deepseek_jax.optim.ema import EMA
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import EXPERT
from deepseek_jax.train.expert_lifecycle import EVENTS, make_lifecycle
from deepseek_jax.train.expert_log import ExpertLog
from deepseek_jax.train.guard import fresh_guard
from deepseek_jax.train.metrics import JsonLines
from deepseek_jax.train.state import fresh_state
from deepseek_jax.train.step import build_program

ROWS, LENGTH, E = 8, 16, 8
SCAN = 'stack/segment_0/block_0/feed_forward'
MTP = 'mtp_0/block/feed_forward'
CHANGES = {
  'one device': {
    'model.feed_forward.growth': Growth(experts=((0, 4), (2, 8)), top_k=((0, 1), (3, 2))),
  },
  # Factors, accumulation, recomputation and experts over devices at once.
  'mesh': {
    'model.feed_forward.form': SharedFactor(rank=4),
    'model.mtp': None,
    'microbatches': 2,
    'remat': EveryLayer(),
    'rules': EXPERT,
    'mesh': MeshConfig(data=2, expert=4),
    'data.batch_size': 2 * ROWS,
  },
}

# The step on eight devices takes half a minute to compile.
KINDS = ['one device', pytest.param('mesh', marks=pytest.mark.slow)]


def experiment(kind):
  return override(
    tiny_mla.get_config(),
    {
      'model.depth': 2,
      'model.dense_layers': 0,
      'data.length': LENGTH,
      'data.batch_size': ROWS,
      'model.feed_forward.breaker': Breaker(cooldown=3, trial=2),
      'ema': EMA(decay=0.9),
      **CHANGES[kind],
    },
  )[0]


@functools.cache
def compiled(kind):
  """The program and its step."""
  config = experiment(kind)
  program = build_program(config, jax.devices()[: 1 if config.mesh == MeshConfig() else 8])
  step = program.step.compile(program.abstract_state, program.abstract_batch())
  return program, step


def batch(rows, seed):
  tokens = np.random.default_rng(seed).integers(3, 259, (rows, LENGTH + 1)).astype(np.int32)
  ones = np.ones((rows, LENGTH), np.int32)
  positions = np.arange(LENGTH, dtype=np.int32) * ones
  return Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), positions, ones, ones - 1)


class Run:
  """A run whose state may be tampered with between steps."""

  def __init__(self, kind):
    """Begins anew."""
    self.program, self.step = compiled(kind)
    key = jax.random.key(0)
    state = self.program.init.compile(key)(key)
    self.state = jax.device_get(state)

  def go(self, spoil=lambda batch: batch):
    """Takes a step, and returns its metrics on the host."""
    rows = self.program.experiment.data.batch_size
    layout = jax.tree.map(lambda leaf: leaf.sharding, self.program.abstract_state)
    given = jax.device_put(spoil(batch(rows, int(self.state.step))), self.program.batch_sharding)
    state, metrics = self.step(jax.device_put(self.state, layout), given)
    self.state, metrics = jax.device_get((state, metrics))
    return metrics

  def change(self, address, index, value):
    """Writes into a parameter."""
    flat = dict(flatten(self.state.params))
    flat[address] = np.array(flat[address])
    flat[address][index] = value(flat[address][index])
    self.state = dataclasses.replace(self.state, params=unflatten(flat))

  def buffer(self, address):
    """Returns a buffer."""
    return flatten(self.state.buffers)[address]


def events(metrics):
  """What happened: {(address, index): name}."""
  found = {}
  for address, codes in flatten(metrics['experts']['events']).items():
    for index in np.argwhere(codes > 0):
      found[address, tuple(index.tolist())] = EVENTS[codes[tuple(index)]]
  assert bool(metrics['experts']['changed']) == bool(found)
  return found


def load(metrics, address=SCAN):
  return flatten(metrics['observed'])[f'{address}/router/load']


@functools.cache
def grown():
  """A run of four steps: born at step 2, and two choices a token from step 3; and its metrics."""
  run, seen = Run('one device'), []
  for _ in range(4):
    before = run.state
    seen.append((before, run.go(), run.state))
  return run, seen


def fresh_run(kind):
  """A run whose experts are all there."""
  run = Run(kind)
  if kind == 'one device':
    run.state = grown()[0].state
  return run


@pytest.mark.slow
def test_growth():
  """One compiled step: few experts and one choice at first; copies that part later."""
  _, seen = grown()
  targets = ROWS * LENGTH
  for number, (_, metrics, _) in enumerate(seen):
    found = load(metrics)
    assert np.all(found.sum(axis=1) == targets * (2 if number == 3 else 1))
    assert np.all((found[:, 4:] > 0).any(axis=1) == (number >= 2))
    assert np.isfinite(metrics['loss'])
  born = {
    (address, (*row, e)): 'born'
    for address, rows in ((SCAN, [(0,), (1,)]), (MTP, [()]))
    for row in rows
    for e in range(4, 8)
  }
  assert [events(metrics) for _, metrics, _ in seen] == [{}, born, {}, {}]
  assert int(seen[-1][1]['experts']['usable']) == 8
  state = seen[1][2]
  params, moments = flatten(state.params), flatten(state.opt_state[1].mu)
  for name in ('gate', 'up', 'down'):
    w = params[f'{SCAN}/{name}']
    apart = np.std(w[:, 4:] - w[:, :4], axis=(2, 3)) / np.std(w[:, :4], axis=(2, 3))
    np.testing.assert_allclose(apart, 0.05, rtol=0.2)
    np.testing.assert_array_equal(moments[f'{SCAN}/{name}'][:, 4:], 0)
    assert np.any(moments[f'{SCAN}/{name}'][:, :4])
    np.testing.assert_array_equal(flatten(state.ema)[f'{SCAN}/{name}'][:, 4:], w[:, 4:])
  router = params[f'{SCAN}/router/weight']
  assert np.all(np.std(router[..., 4:] - router[..., :4], axis=1) < 0.1 * np.std(router))
  bias = flatten(state.buffers)[f'{SCAN}/router/selection_bias']
  np.testing.assert_array_equal(bias[:, 4:], bias[:, :4])
  # Before they are born, their bias stays: what may not be chosen is no expert with too few tokens.
  before = flatten(seen[0][2].buffers)[f'{SCAN}/router/selection_bias']
  np.testing.assert_array_equal(before[:, 4:], 0)
  assert np.any(before[:, :4] > 0)
  assert np.any(before[:, :4] < 0)


@pytest.mark.slow
def test_buffers_are_regrouped():
  """Layer by layer and back, as for another grouping: counts of a layer are single numbers."""
  state, model = grown()[0].state, experiment('one device').model
  segments = plan_segments(model)
  layers = canonical(state.buffers, segments)
  assert layers['layers']['1']['feed_forward']['active_experts'].shape == ()
  again = grouped(layers, segments)
  jax.tree.map(np.testing.assert_array_equal, again, state.buffers)
  assert jax.tree.structure(again) == jax.tree.structure(state.buffers)


WEIGHT = {'one device': 'gate', 'mesh': 'gate_in'}


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_weights_that_are_not_finite_cost_no_step(kind):
  """Routed around at once, tried again after the cool-down, then closed."""
  run = fresh_run(kind)
  row, expert = 1, 3
  name = f'{SCAN}/{WEIGHT[kind]}'
  run.change(name, (row, expert, 0, 1), lambda x: np.nan)
  history = []
  for step in range(7):
    metrics = run.go()
    assert np.isfinite(metrics['loss']), step
    assert np.isfinite(metrics['grad_norm']), step
    assert int(metrics['skipped_steps']) == 0
    history.append((events(metrics), load(metrics), run.buffer(f'{SCAN}/breaker')))
    others = np.delete(flatten(run.state.params)[name][row], expert, axis=0)
    assert np.isfinite(others).all()
  where = (SCAN, (row, expert))
  assert [found for found, _, _ in history] == [
    {where: 'weights'}, {}, {}, {where: 'retried'}, {}, {where: 'closed'}, {},
  ]  # fmt: skip
  states = [state[row, expert] for _, _, state in history]
  assert states == [OPEN] * 3 + [HALF_OPEN] * 2 + [CLOSED] * 2
  for number, (_, found, state) in enumerate(history):
    assert (found[row, expert] == 0) == (number < 4)
    np.testing.assert_array_equal(found.sum(axis=1), found[0].sum())
    others = np.array(state)
    others[row, expert] = CLOSED
    np.testing.assert_array_equal(others, CLOSED)
  # What came back is finite everywhere, averages and moments too.
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.state))


def huge(run, address, index):
  """Finite weights of an expert that make something infinite of any token."""
  for name in ('gate', 'up', 'down'):
    run.change(f'{address}/{name}', index, lambda x: x * 1e25)


def steep(run, address, index):
  """Finite weights of an expert whose output is zero and whose gradient overflows."""
  run.change(f'{address}/gate', index, lambda x: 0 * x)
  for name in ('up', 'down'):
    run.change(f'{address}/{name}', index, lambda x: x * 1e22)


@pytest.mark.parametrize(('spoil', 'cause', 'fault'), [(huge, 'output', 1), (steep, 'gradient', 2)])
@pytest.mark.parametrize(('address', 'index'), [(SCAN, (0, 5)), (MTP, (2,))])
def test_what_breaks_in_use_costs_one_step(spoil, cause, fault, address, index):
  """The guard skips it, the breaker opens the one expert, and the next step is sound."""
  run = fresh_run('one device')
  spoil(run, address, index)
  before = run.state
  metrics = run.go()
  assert int(metrics['guard']['fault']) == fault
  assert events(metrics) == {(address, index): cause}
  jax.tree.map(np.testing.assert_array_equal, run.state.params, before.params)
  for _ in range(2):
    metrics = run.go()
    assert int(metrics['guard']['fault']) == 0
    assert np.isfinite(metrics['loss'])
    assert load(metrics, address)[index] == 0
    assert events(metrics) == {}
  metrics = run.go()
  assert events(metrics) == {(address, index): 'retried'}
  healed = flatten(run.state.params)[f'{address}/up'][index]
  assert np.max(np.abs(healed)) < 10
  assert int(run.go()['guard']['fault']) == 0


def poison_weights(batch):
  weights = np.array(batch.weights)
  weights[2] = np.nan
  return batch.replace(weights=weights)


@pytest.mark.parametrize('kind', KINDS)
def test_what_goes_wrong_elsewhere_opens_nobody(kind):
  """A poisoned embedding, and a loss that is not finite in one row."""
  run = fresh_run(kind)
  metrics = run.go(poison_weights)
  assert int(metrics['guard']['fault']) == 1
  assert events(metrics) == {}
  token = batch(run.program.experiment.data.batch_size, int(run.state.step)).tokens[0, 5]
  run.change('embedding/weight', (token, 3), lambda x: np.nan)
  metrics = run.go()
  assert int(metrics['guard']['fault']) == 1
  assert events(metrics) == {}
  assert int(metrics['experts']['usable']) == E


def test_no_expert_left(tmp_path):
  """Said by the step, and by the log in words; there is nothing to try again with."""
  run = fresh_run('one device')
  run.change(f'{MTP}/up', (slice(None), 0, 0), lambda x: np.inf * np.abs(x))
  metrics = run.go()
  assert int(metrics['experts']['usable']) == 0
  assert np.isfinite(metrics['loss'])

  class Screen:
    lines: list[str] = []  # noqa: RUF012

    def message(self, text):
      self.lines.append(text)

  rows = JsonLines(tmp_path / 'faults.jsonl')
  log = ExpertLog(rows, Screen(), plan_segments(run.program.experiment.model))
  log.read(5, dict(grown()[1][1][1]))
  assert not log.exhausted
  assert rows.read() == []
  assert 'step 5: layers/1: experts born: 4, 5, 6, 7' in Screen.lines
  log.read(6, metrics)
  assert log.exhausted
  assert 'experts' not in metrics
  written = rows.read()
  assert [row['expert'] for row in written] == list(range(E))
  assert {(row['step'], row['kind'], row['layer']) for row in written} == {
    (6, 'expert_weights', 'mtp_0')
  }
  assert 'mtp_0: expert 7 is out of use: its weights are not finite' in log.last
  for _ in range(4):
    assert events(run.go()) == {}


@pytest.mark.parametrize('lowered', [False, True])
def test_a_loss_scale_that_falls_is_the_one_to_blame(lowered):
  """Gradients overflow where the scale is too high; an expert is at fault where it cannot fall."""
  precision = Float16(scaling=BackOff(initial=4.0, minimum=1.0))
  config = override(experiment('one device'), {'precision': precision, 'model.mtp': None})[0]
  flags = jnp.zeros((2, E)).at[1, 6].set(1.0)
  buffers = {'breaker': jnp.zeros((2, E)), 'breaker_since': jnp.zeros((2, E))}
  buffers |= {'active_experts': jnp.full(2, 8.0), 'active_choices': jnp.full(2, 2.0)}
  before = fresh_state(
    {},
    unflatten({f'{SCAN}/{name}': leaf for name, leaf in buffers.items()}),
    (),
    guard=fresh_guard(config.guard, precision),
  )
  scaling = before.guard.scaling._replace(scale=jnp.float32(2.0 if lowered else 4.0))
  settled = dataclasses.replace(before, guard=before.guard.replace(scaling=scaling))
  none, many = jnp.zeros((2, E)), jnp.ones((2, E))
  observed = {f'{SCAN}/breaker/weights': none, f'{SCAN}/breaker/output': none}
  observed[f'{SCAN}/router/load'] = many
  advance = jax.jit(lambda *given: make_lifecycle(config, {})(*given)[1])
  taps = {f'{SCAN}/breaker': flags}
  report = jax.device_get(advance(before, settled, unflatten(observed), taps))
  assert events(report) == ({} if lowered else {(SCAN, (1, 6)): 'gradient'})
  # Where every expert that met a token is struck, it is none of theirs.
  observed[f'{SCAN}/router/load'] = flags
  report = jax.device_get(advance(before, settled, unflatten(observed), taps))
  assert events(report) == {}
