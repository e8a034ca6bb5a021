"""Experts placed anew in a run: by hand on made-up counts, and in a run that is interrupted."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.override import override
from deepseek_jax.data.source import TextFiles
from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.layers.moe.dispatch.local import Local
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.placement import Replicas
from deepseek_jax.models.decoder import plan_segments
from deepseek_jax.ops.placement import device_loads, imbalance
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import EXPERT
from deepseek_jax.train.checkpoint import restore_params
from deepseek_jax.train.display import QuietDisplay
from deepseek_jax.train.loop import train
from deepseek_jax.train.metrics import JsonLines
from deepseek_jax.train.placement import Global, Hierarchical, Rebalance, count_tokens, rebalance
from deepseek_jax.train.workdir import Workdir

EXPERTS, SLOTS = 8, 12
COMPILED = '/jax/core/compile/backend_compile_duration'


def experiment(**changes):
  """Two scanned layers of experts, four devices that share them."""
  return override(
    tiny_mla.get_config(),
    {
      'model.depth': 2,
      'model.dense_layers': 0,
      'model.mtp': None,
      'model.feed_forward': MoE(
        experts=EXPERTS,
        top_k=2,
        hidden=16,
        balance=None,
        dispatch=AllToAll(),
        placement=Replicas(slots=SLOTS),
      ),
      'balance': None,
      'guard': None,
      'placement': Rebalance(every=3),
      'mesh': MeshConfig(data=2, expert=4),
      'rules': EXPERT,
      **changes,
    },
  )[0]


def tree(name: str, value) -> dict:
  """A collection of the two layers, which share a scan."""
  return {'stack': {'segment_0': {'block_0': {'feed_forward': {name: value}}}}}


def test_counts_and_plans_by_hand():
  """Layer 0 has one heavy expert; layer 1 is even, and stays as it is."""
  segments = plan_segments(experiment().model)
  loads = np.array([[9, 1, 1, 1], [2, 2, 2, 2]], np.float32)
  old = np.array([[0, 0, 1, 2, 3, 3], [3, 0, 1, 2, 0, 1]], np.int32)
  buffers = tree('slots', jax.device_put(old))
  feed_forward = buffers['stack']['segment_0']['block_0']['feed_forward']
  feed_forward['expert_tokens'] = jax.device_put(np.ones_like(loads))
  feed_forward['router'] = {'selection_bias': np.zeros(4)}
  counted = count_tokens(buffers, tree('router', {'load': loads - 1}))
  placed = rebalance(counted, Global(), 2, segments)
  found = placed.buffers['stack']['segment_0']['block_0']['feed_forward']
  assert set(found) == {'slots', 'expert_tokens', 'router'}
  np.testing.assert_array_equal(found['expert_tokens'], 0)
  # 9 + 1 against 1 + 1; then 9 is shared equally, and so is one of the ones.
  assert placed.before == {'layers/0': pytest.approx(10 / 6), 'layers/1': 1.0}
  assert placed.after == {'layers/0': pytest.approx(1.0), 'layers/1': 1.0}
  after = imbalance(device_loads(loads, np.asarray(found['slots']), 2))
  np.testing.assert_allclose(after, 1.0)
  np.testing.assert_array_equal(found['slots'][1], old[1])
  again = rebalance(
    count_tokens(placed.buffers, tree('router', {'load': loads})), Global(), 2, segments
  )
  same = again.buffers['stack']['segment_0']['block_0']['feed_forward']['slots']
  np.testing.assert_array_equal(same, found['slots'])
  # Nothing counted, nothing moved.
  idle = rebalance(again.buffers, Global(), 2, segments)
  assert idle.before == idle.after == {'layers/0': 1.0, 'layers/1': 1.0}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model.feed_forward.placement': None}, 'placement: no layer of the model has slots'),
    ({'model.feed_forward.placement': Replicas(slots=13)}, '13 slots are not divisible by 4 dev'),
    (
      {'placement.policy': Hierarchical(groups=3, nodes=3)},
      '8 experts are not divisible by 3 groups',
    ),
    ({'model.feed_forward.dispatch': Local()}, 'dispatch Local brings the experts to the tokens'),
    ({'placement': None, 'model.feed_forward.placement.slots': 9}, '9 slots are not divisible'),
  ],
)
def test_what_does_not_fit_is_said(changes, message):
  assert experiment().check(8) == []
  faults = experiment(**changes).check(8)
  assert any(message in fault for fault in faults), faults


def test_wrong_fields():
  with pytest.raises(ConfigError, match='`every` is 0'):
    Rebalance(every=0)
  with pytest.raises(ConfigError, match='`groups` is 4, not divisible by the 3 `nodes`'):
    Hierarchical(groups=4, nodes=3)


class Listening(QuietDisplay):
  """Remembers what was compiled, and what was said."""

  def __init__(self):
    self.compiled, self.messages = [], []
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, seconds: float, fun_name: str = '', **_):
    if event == COMPILED:
      self.compiled.append(fun_name)

  def message(self, text):
    self.messages.append(text)


def run(path: pathlib.Path, text: str, cache: pathlib.Path) -> Listening:
  """Trains eight steps, with placements after 3 and 6 and a checkpoint after 4."""
  config = experiment(
    **{
      'data.source': TextFiles(text),
      'data.length': 32,
      'schedule.warmup_steps': 2,
      'train_steps': 8,
      'cadence.log': 1,
      'cadence.save': 4,
    }
  )
  workdir, display = Workdir(path), Listening()
  workdir.write(config)
  train(config, workdir, cache, display)
  return display


@pytest.mark.slow
def test_a_run_places_experts_and_an_interrupted_one_does_so_alike(text, tmp_path, cache_dir):
  whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
  shown = run(whole, text, cache_dir)
  rows = JsonLines(whole / 'placements.jsonl').read()
  assert [row['step'] for row in rows] == [3, 6]
  for row in rows:
    assert set(row['before']) == set(row['after']) == {'layers/0', 'layers/1'}
    for layer, before in row['before'].items():
      assert before > 1
      assert row['after'][layer] <= before
  assert max(rows[0]['after'].values()) < max(rows[0]['before'].values())
  assert sum('experts placed' in message for message in shown.messages) == 2
  assert shown.compiled.count('jit(step)') == 1

  shutil.copytree(whole, resumed)
  shutil.rmtree(resumed / 'checkpoints' / '8')
  run(resumed, text, cache_dir)
  assert JsonLines(resumed / 'placements.jsonl').read() == rows
  ends = [restore_params(path / 'checkpoints')[:2] for path in (whole, resumed)]
  jax.tree.map(np.testing.assert_array_equal, *ends)
  feed_forward = ends[0][1]['stack']['segment_0']['block_0']['feed_forward']
  # Slots were filled anew, and what was counted since is two steps of 8 rows.
  assert (np.asarray(feed_forward['slots']) != np.arange(SLOTS) % EXPERTS).any()
  assert 0 < np.asarray(feed_forward['expert_tokens'][0]).sum() <= 2 * 8 * 32 * 2
  losses = [
    [row['loss'] for row in JsonLines(path / 'metrics.jsonl').read()] for path in (whole, resumed)
  ]
  assert losses[0] == losses[1]
