"""What the guard skips, and that a skipped step changes nothing."""

import dataclasses
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.loss_scale import BackOff, GradientNorm, Static
from deepseek_jax.core.override import override
from deepseek_jax.core.precision import Float16, Float32
from deepseek_jax.data.pipeline import TextData
from deepseek_jax.data.source import TextFiles
from deepseek_jax.optim.ema import EMA
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.train.checkpoint import Checkpoints, restore_params
from deepseek_jax.train.display import QuietDisplay
from deepseek_jax.train.faults import SkippedStepsError
from deepseek_jax.train.guard import KINDS, Deviations, Guard, Multiple, fresh_guard, make_settle
from deepseek_jax.train.loop import train
from deepseek_jax.train.metrics import JsonLines
from deepseek_jax.train.state import fresh_state
from deepseek_jax.train.step import build_program
from deepseek_jax.train.workdir import Workdir, compare

NAN, INF = math.nan, math.inf


def judge(guard, steps, precision=Float32()):
  """Runs (loss, norm) pairs through the rule; returns fault names, states and reports.

  Weights count proposals: 100 · step where the step is accepted.
  """
  settle = jax.jit(make_settle(guard, precision))
  state = fresh_state(jnp.zeros(3), jnp.zeros(2), jnp.zeros(1), guard=fresh_guard(guard, precision))
  found = []
  for number, (loss, norm) in enumerate(steps, start=1):
    proposed = state.replace(
      params=jnp.full(3, 100.0 * number),
      buffers=jnp.full(2, NAN if math.isnan(loss) else float(number)),
      opt_state=state.opt_state + 1,
    )
    losses = {'loss': jnp.float32(loss), 'auxiliary_loss': jnp.float32(0)}
    before = state
    state, report = settle(state, proposed, losses, jnp.float32(norm))
    fault = KINDS[int(report['guard']['fault'])]
    kept = (state.params, state.buffers, state.opt_state)
    expected = before if fault else proposed
    for a, b in zip(kept, (expected.params, expected.buffers, expected.opt_state), strict=True):
      np.testing.assert_array_equal(a, b)
    found.append((fault, jax.device_get(state.guard), jax.device_get(report)))
  return found


def names(found) -> list[str]:
  return [fault for fault, _, _ in found]


def test_what_is_not_finite_is_skipped_and_counted():
  steps = [(1, 1), (NAN, NAN), (INF, 1), (1, NAN), (1, INF), (1, 1), (NAN, 1)]
  found = judge(Guard(spike=None), steps)
  loss, gradient = 'nonfinite_loss', 'nonfinite_gradient'
  assert names(found) == ['', loss, loss, gradient, gradient, '', loss]
  assert [int(state.skipped) for _, state, _ in found] == [0, 1, 2, 3, 4, 4, 5]
  assert [int(state.in_a_row) for _, state, _ in found] == [0, 1, 2, 3, 4, 0, 1]
  assert found[-1][2]['skipped_steps'] == 5


def spikes(rule, steps) -> list[str]:
  """Names of faults by the documented rule, in float64 and with lists."""
  losses, shares, streak, result = [], [], 0, []
  for pair in steps:
    mean = np.average(losses, axis=0, weights=shares) if losses else np.zeros(2)
    variance = np.average((losses - mean) ** 2, axis=0, weights=shares) if losses else np.zeros(2)
    if isinstance(rule, Multiple):
      bounds = mean * [rule.loss, rule.gradient]
    else:
      bounds = mean + rule.limit * np.maximum(np.sqrt(variance), rule.floor * mean)
    over = len(losses) >= rule.warmup_steps and np.any(np.array(pair) > bounds)
    if not np.all(np.isfinite(pair)):
      result.append('nonfinite_loss' if not np.isfinite(pair[0]) else 'nonfinite_gradient')
      continue
    if over and streak < rule.patience:
      streak += 1
      result.append('spike')
      continue
    if over:
      losses, shares = [], []
    share = max(1 - rule.decay, 1 / (len(losses) + 1))
    shares = [*(weight * (1 - share) for weight in shares), share]
    losses, streak = [*losses, pair], 0
    result.append('')
  return result


@pytest.mark.parametrize(
  'rule',
  [
    Deviations(limit=3.0, floor=0.02, decay=0.9, warmup_steps=5, patience=2),
    Multiple(loss=1.5, gradient=3.0, decay=0.9, warmup_steps=5, patience=2),
  ],
  ids=['deviations', 'multiple'],
)
def test_spikes_follow_their_definition(rule):
  generator = np.random.default_rng(0)
  steps = np.abs(generator.normal([3, 1], [0.1, 0.2], (60, 2)))
  steps[2] *= 1.7  # in the warm-up
  steps[[20, 33, 34]] *= [4, 1]  # in the loss alone
  steps[[26, 50]] *= [1, 30]  # in the gradient alone
  steps[[21, 51]] = [[NAN, 1], [2, INF]]  # right after a spike
  steps[40:48] *= 6  # for good: patience, then the new level
  found = names(judge(Guard(spike=rule), steps.astype(np.float32)))
  assert found == spikes(rule, steps.astype(np.float32).astype(np.float64))
  for number in (20, 26, 33, 34, 40, 41, 50):
    assert found[number] == 'spike', number
  assert found[2] == found[42] == found[47] == ''


def test_a_spike_that_stays_does_not_stop_all_learning():
  """After `patience` skips the new level is taken, long before `stop_after`."""
  guard = Guard(spike=Deviations(warmup_steps=10, patience=3), stop_after=5)
  found = judge(guard, [(2.0, 1.0)] * 20 + [(9.0, 1.0)] * 30)
  assert names(found)[20:] == ['spike'] * 3 + [''] * 27
  assert max(int(state.in_a_row) for _, state, _ in found) == 3


def test_ordinary_noise_is_never_a_spike():
  """The default rule on a falling loss with wide noise and heavy-tailed gradient norms."""
  generator = np.random.default_rng(1)
  time = np.arange(400)
  loss = 2 + 6 * np.exp(-time / 60) + generator.normal(0, 0.15, 400)
  norm = np.exp(generator.normal(0, 0.4, 400)) * (1 + 3 * np.exp(-time / 30))
  assert set(names(judge(Guard(), np.stack([loss, norm], axis=1).astype(np.float32)))) == {''}


def test_overflow_moves_the_scale_and_counts_only_at_the_end_of_its_range():
  """While the scale can fall, an overflow is the rule at work and stops no run."""
  rule = BackOff(initial=4.0, minimum=1.0)
  found = judge(Guard(), [(1, INF)] * 4 + [(1, 1), (NAN, INF)], Float16(scaling=rule))
  assert names(found) == ['overflow'] * 4 + ['', 'nonfinite_loss']
  assert [float(report['loss_scale']) for _, _, report in found] == [4, 2, 1, 1, 1, 1]
  assert [int(state.in_a_row) for _, state, _ in found] == [0, 0, 1, 2, 0, 1]
  # A loss that is not finite says nothing about the scale.
  assert float(found[-1][1].scaling.scale) == 1
  assert int(found[-1][1].scaling.clean) == 1
  found = judge(None, [(1, INF)] * 3 + [(1, 1)], Float16(scaling=Static()))
  assert names(found) == ['overflow'] * 3 + ['']


def test_nothing_guards():
  assert fresh_guard(None, Float32()) == ()
  state = fresh_state(jnp.zeros(1), {}, ())
  proposed = state.replace(params=jnp.full(1, NAN))
  settled, report = make_settle(None, Float32())(state, proposed, {}, jnp.float32(NAN))
  assert settled is proposed
  assert report == {}


@pytest.mark.parametrize(
  'make',
  [
    lambda: Guard(stop_after=0),
    lambda: Deviations(limit=0.0),
    lambda: Deviations(decay=1.0),
    lambda: Deviations(floor=-1.0),
    lambda: Multiple(loss=1.0),
    lambda: Multiple(patience=0),
    lambda: Multiple(warmup_steps=0),
  ],
)
def test_impossible_guards(make):
  with pytest.raises(ConfigError):
    make()


def experiment(**changes):
  """A run of seconds, with averaged weights."""
  return override(
    tiny_mla.get_config(),
    {
      'model.depth': 2,
      'model.mtp': None,
      'data.length': 32,
      'schedule.warmup_steps': 2,
      'train_steps': 12,
      'ema': EMA(decay=0.9),
      'cadence.log': 1,
      'cadence.save': 4,
      'cadence.evaluate': 6,
      **changes,
    },
  )[0]


def poison(batch, row=None):
  """The batch with loss weights that are NaN, in one row or in all."""
  weights = np.array(batch.weights)
  weights[slice(None) if row is None else row] = np.nan
  return batch.replace(weights=weights)


@pytest.mark.parametrize(
  'layout',
  [
    'devices',
    pytest.param('float16', marks=pytest.mark.slow),
    pytest.param('single', marks=pytest.mark.slow),
    pytest.param('microbatches', marks=pytest.mark.slow),
  ],
)
def test_a_skipped_step_changes_nothing(layout, cache_dir):
  """One NaN row, on one device or in one microbatch: all of the state stays, to the bit."""
  changes = {
    'microbatches': {'microbatches': 4},
    'float16': {'precision': Float16(scaling=GradientNorm())},
  }.get(layout, {})
  config = experiment(**changes)
  if layout == 'devices':
    config = dataclasses.replace(config, mesh=MeshConfig(data=8))
  devices = jax.devices() if layout == 'devices' else jax.devices()[:1]
  program = build_program(config, devices)
  key = jax.random.key(0)
  state = program.init.compile(key)(key)
  step = program.step.compile(program.abstract_state, program.abstract_batch())
  batches = config.data.prepare(cache_dir).train_batches(0)
  put = lambda batch: jax.device_put(batch, program.batch_sharding)  # noqa: E731
  first, second = next(batches), next(batches)
  state, metrics = step(state, put(first))
  before = jax.device_get(state)
  state, metrics = step(state, put(poison(second, row=3)))
  after = jax.device_get(state)
  assert KINDS[int(metrics['guard']['fault'])] == 'nonfinite_loss'
  assert int(after.step) == 2
  assert int(after.guard.skipped) == 1
  parts = ('params', 'buffers', 'opt_state', 'ema')
  for part in parts:
    pair = getattr(before, part), getattr(after, part)
    assert len(jax.tree.leaves(pair[0])) > 1 or part == 'buffers'
    jax.tree.map(np.testing.assert_array_equal, *pair)
  # The router's bias did move in the step before: that it stays is no accident.
  assert any(np.any(leaf) for leaf in jax.tree.leaves(before.buffers))
  state, metrics = step(state, put(second))
  assert int(metrics['guard']['fault']) == 0
  assert np.isfinite(float(metrics['loss']))
  final = jax.device_get(state)
  for address, old in jax.tree_util.tree_leaves_with_path(before.params):
    new = dict(jax.tree_util.tree_leaves_with_path(final.params))[address]
    assert np.any(new != old), address
  # The schedule goes on where the optimizer is, not where the count of steps is.
  assert float(metrics['learning_rate']) == pytest.approx(1e-2 * 2 / 3)
  assert int(final.guard.skipped) == 1


@pytest.fixture
def poisoned(monkeypatch):
  """Makes the batches of some steps poisonous, whatever step a run begins at."""
  clean = TextData.train_batches

  def choose(*steps):
    def train_batches(self, step, rows=None):
      for number, batch in enumerate(clean(self, step, rows), start=step + 1):
        yield poison(batch) if number in steps else batch

    monkeypatch.setattr(TextData, 'train_batches', train_batches)

  return choose


class _Messages(QuietDisplay):
  """Keeps what is shown."""

  def __init__(self):
    self.texts = []

  def message(self, text):
    self.texts.append(text)


def run(config, path: pathlib.Path, cache: pathlib.Path, display=None):
  """Trains in `path`, as the script does."""
  workdir = Workdir(path)
  workdir.write(config)
  return train(config, workdir, cache, display or QuietDisplay())


def whole_state(config, path: pathlib.Path, step: int):
  """Everything that a checkpoint holds."""
  abstract = build_program(config).abstract_state
  return jax.device_get(Checkpoints(path / 'checkpoints').restore(abstract, step).state)


@pytest.mark.slow
def test_faults_are_written_and_a_resumed_run_is_the_same_to_the_bit(
  text, tmp_path, cache_dir, poisoned
):
  """Faults before and after the checkpoint that the second run goes on from."""
  config = experiment(**{'data.source': TextFiles(text)})
  poisoned(3, 7, 8)
  display = _Messages()
  whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
  assert run(config, whole, cache_dir, display).step == 12
  shutil.copytree(whole, resumed)
  for step in (8, 12):
    shutil.rmtree(resumed / 'checkpoints' / str(step))
  faults = JsonLines(whole / 'faults.jsonl').read()
  assert [(row['step'], row['kind']) for row in faults] == [
    (step, 'nonfinite_loss') for step in (3, 7, 8)
  ]
  for row in faults:
    assert row['loss'] is None
    assert row['grad_norm'] is None
    assert row['documents'] == sorted(set(row['documents']))
    assert len(row['titles']) == len(row['documents']) > 3
    assert all(title.endswith('.txt') for title in row['titles'])
    assert 'not finite' in row['message']
  assert [text for text in display.texts if text.startswith('step 7 skipped')]
  metrics = JsonLines(whole / 'metrics.jsonl').read()
  assert [row['skipped_steps'] for row in metrics] == [0, 0, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3]
  assert 'loss_scale' not in metrics[0]
  assert [row['step'] for row in metrics if row['loss'] is None] == [3, 7, 8]
  evaluations = JsonLines(whole / 'evaluations.jsonl').read()
  assert [row['step'] for row in evaluations] == [6, 12]
  assert run(config, resumed, cache_dir).step == 12
  assert JsonLines(resumed / 'faults.jsonl').read() == faults
  assert JsonLines(resumed / 'evaluations.jsonl').read() == evaluations
  for row in evaluations:
    assert row['ema_bits_per_byte'] != row['bits_per_byte']
  ends = [whole_state(config, path, 12) for path in (whole, resumed)]
  assert int(ends[0].guard.skipped) == 3
  assert int(ends[0].guard.seen) == 9
  assert len(jax.tree.leaves(ends[0].ema)) > 20
  jax.tree.map(np.testing.assert_array_equal, *ends)
  for weights, expected in (('averaged', ends[0].ema), ('raw', ends[0].params)):
    found = restore_params(whole / 'checkpoints', weights=weights)[0]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_too_many_in_a_row_stop_the_run_with_all_saved(text, tmp_path, cache_dir, poisoned):
  """The state is that of the last good step; the same command goes on behind the fault."""
  changes = {'data.source': TextFiles(text), 'guard.stop_after': 3, 'cadence.save': None}
  config = experiment(**changes)
  poisoned(6, 7, 8, 9)
  with pytest.raises(SkippedStepsError, match='3 steps in a row were skipped') as caught:
    run(config, tmp_path, cache_dir)
  assert isinstance(caught.value, ConfigError), 'scripts say it in one message and exit with 2'
  steps = Checkpoints(tmp_path / 'checkpoints').steps()
  # One step ahead of what it reads, the loop had dispatched one more.
  assert steps == (9,)
  assert 'step 9 is saved' in str(caught.value)
  assert str(tmp_path / 'faults.jsonl') in str(caught.value)
  state = whole_state(config, tmp_path, 9)
  assert int(state.guard.skipped) == 4
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))
  assert [row['step'] for row in JsonLines(tmp_path / 'faults.jsonl').read()] == [6, 7, 8, 9]
  assert [row['step'] for row in JsonLines(tmp_path / 'metrics.jsonl').read()] == list(range(1, 10))
  # Who goes on has every chance again: two more do not add up with the four before.
  poisoned(10, 11)
  assert run(config, tmp_path, cache_dir).step == 12
  assert Checkpoints(tmp_path / 'checkpoints').steps() == (9, 12)


def test_a_run_does_not_lose_its_guard_on_the_way():
  """The state of a guard or an average cannot appear from nowhere; its dials may change."""
  config = experiment()
  edited = dataclasses.replace(config, guard=Guard(stop_after=3), ema=EMA(decay=0.99))
  assert len(compare(config, edited)) > 1
  for part in ('guard', 'ema'):
    with pytest.raises(ConfigError, match=part):
      compare(config, dataclasses.replace(config, **{part: None}))


def test_config_reads_back(tmp_path):
  """Kinds of the guard in JSON and Python, as the workdir writes them."""
  config = experiment(
    guard=Guard(spike=Multiple(loss=3.0)), precision=Float16(scaling=BackOff(interval=7))
  )
  workdir = Workdir(tmp_path / 'run')
  workdir.write(config)
  assert workdir.read() == config
  assert json.loads(workdir.config.read_text())
