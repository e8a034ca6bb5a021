"""A training step in stages is the step on one device.

Whatever the schedule, the number of stages and what lies beside them on the mesh: the loss, every
gradient, the updated parameters, what the layers observed and the routers' biases, after one step
and after two. What is compared, and how closely, is what `test_sharded` compares; arrays are
compared by canonical address, because stages group the layers in another way.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

from configs import tiny_caption, tiny_mhc, tiny_mla, tiny_v4
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.override import override_from_text
from deepseek_jax.core.precision import BFloat16
from deepseek_jax.core.serialise import from_json, to_json
from deepseek_jax.core.tree import flatten
from deepseek_jax.data.batch import Batch
from deepseek_jax.layers.moe.balance import SequenceBalance
from deepseek_jax.layers.moe.dispatch.all_gather import AllGather
from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.layers.moe.dispatch.capacity import Capacity
from deepseek_jax.layers.moe.dispatch.local import Local
from deepseek_jax.layers.moe.router.noise import Gumbel
from deepseek_jax.layers.moe.router.sigmoid import Sigmoid
from deepseek_jax.models.decoder import canonical, grouped
from deepseek_jax.models.pipeline import GPipe, Interleaved
from deepseek_jax.models.plan import Segment
from deepseek_jax.models.remat import EveryLayer, Save, SquareRoot
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import Constant
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import FSDP, PIPELINE
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.initialise import resume_state
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.step import Program, build_program, segments_of
from tests.parity.test_sharded import TOLERANCE, assert_same, packed, pictured, start

ROWS, LENGTH = 8, 32
ONE = MeshConfig(data=1)
REMAT = EveryLayer()
CONFIGS = {
  'mla': tiny_mla,
  'noise': tiny_mla,
  'mhc': tiny_mhc,
  'v4': tiny_v4,
  'caption': tiny_caption,
}


def experiment(
  kind: str, mesh: MeshConfig, depth: int, dispatch: Any = Local(), **changes: Any
) -> Experiment:
  """A tiny run under the preset, of some depth."""
  base = CONFIGS[kind].get_config()
  text = base.model.text if kind == 'caption' else base.model
  # Heavy enough for a tick that counts too much to show.
  sparse = dataclasses.replace(
    text.feed_forward, balance=SequenceBalance(weight=0.1), dispatch=dispatch
  )
  if kind == 'noise':
    sparse = dataclasses.replace(sparse, router=Sigmoid(noise=Gumbel()))
  model = dataclasses.replace(text, feed_forward=sparse, depth=depth)
  if kind == 'caption':
    model = dataclasses.replace(base.model, text=model)
  chosen = {
    'model': model,
    'data': dataclasses.replace(base.data, length=LENGTH, batch_size=ROWS),
    'optimizer': AdamW(peak_lr=1e-2, epsilon=1e-2),
    'schedule': Constant(),
    'rules': PIPELINE,
    'mesh': mesh,
  }
  return dataclasses.replace(base, **(chosen | changes))


@functools.cache
def program(chosen: Experiment) -> Program:
  """The program of an experiment, on as many devices as its mesh has."""
  devices = math.prod(size or 1 for size in dataclasses.asdict(chosen.mesh).values())
  return build_program(chosen, jax.devices()[:devices])


def regroup(tree: Any, old: tuple[Segment, ...], new: tuple[Segment, ...]) -> Any:
  """Variables of one collection, for another plan."""
  return grouped(jax.device_get(canonical(tree, old)), new)


def start_like(made: Program, plain: Program) -> TrainState:
  """The state that `plain` starts with, for a program with another plan."""
  state, old, new = start(plain), segments_of(plain.experiment), segments_of(made.experiment)
  abstract = made.abstract_state
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
  buffers = regroup(state.buffers, old, new)
  state = zeros.replace(
    params=regroup(state.params, old, new), buffers=jax.tree.map(table, buffers, abstract.buffers)
  )
  return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract))


def table(array: np.ndarray, like: Any) -> np.ndarray:
  """A buffer as it is, or in the place of a hash router's table [..., V, K] two experts a token."""
  if np.issubdtype(like.dtype, np.floating):
    return array
  rows, choices = like.shape[-2:]
  numbers = np.arange(rows)[:, None] * 3 + np.arange(choices)
  return np.broadcast_to(numbers % 8, like.shape).astype(like.dtype)


def batch_of(seed: int, chosen: Experiment) -> Batch:
  """Rows of packed documents of very unequal length; with pictures where there are any."""
  make, rows = packed if not chosen.data.media else pictured, chosen.data.batch_size
  parts = [make(seed + 10 * number) for number in range(-(-rows // ROWS))]
  return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:rows], *parts)


@functools.cache
def two_steps(chosen: Experiment, plain: Experiment) -> list[tuple[dict, dict, dict]]:
  """Arrays of the state by canonical address, what was observed, and scalars, of two steps."""
  made, like = program(chosen), program(plain)
  step = made.step.compile(made.abstract_state, made.abstract_batch())
  segments, state, results = segments_of(chosen), start_like(made, like), []
  name = lambda tree: canonical(jax.device_get(tree), segments)  # noqa: E731
  for seed in (1, 2):
    state, metrics = step(state, jax.device_put(batch_of(seed, chosen), made.batch_sharding))
    moments = state.opt_state[1]
    arrays = {
      'mean gradient': name(moments.mu),
      'mean squared gradient': name(moments.nu),
      'parameters': name(state.params),
      'buffers': name(state.buffers),
    }
    observed = name(metrics.pop('observed'))
    scalars = {k: v for k, v in jax.device_get(metrics).items() if k not in ('buffers', 'guard')}
    results.append((arrays, observed, scalars))
  return results


def assert_same_steps(chosen: Experiment, plain: Experiment, tolerance: float = TOLERANCE) -> None:
  """Compares everything that two steps return with those of another program."""
  found, expected = two_steps(chosen, plain), two_steps(plain, plain)
  for number, (one, other) in enumerate(zip(found, expected, strict=True), start=1):
    where = f'after step {number}'
    for name, value in other[2].items():
      assert one[2][name] == pytest.approx(value, rel=tolerance), f'{where}: {name}'
    for name, arrays in other[0].items():
      # The relative error of a square is twice that of the number.
      limit = tolerance * (2 if 'squared' in name else 1)
      assert_same(one[0][name], arrays, f'{where}: {name}', limit)
    observed, wanted = flatten(one[1]), flatten(other[1])
    assert observed.keys() == wanted.keys()
    for address, value in wanted.items():
      limit = 1e-3 if '/indexer/' in address else 0
      np.testing.assert_allclose(observed[address], value, rtol=limit, err_msg=address)


def plain_of(chosen: Experiment) -> Experiment:
  """The run without stages, on one device."""
  return dataclasses.replace(chosen, pipeline=None, mesh=ONE, remat=None, microbatches=1)


def alone_of(chosen: Experiment) -> Experiment:
  """The run on one device that is all stages: the same microbatches, one after the other."""
  return dataclasses.replace(chosen, mesh=ONE, remat=None)


def run(name: str) -> None:
  """Compares one of `RUNS` with the same run on one device."""
  kind, mesh, depth, pipeline, changes = RUNS[name]
  chosen = experiment(kind, mesh, depth, pipeline=pipeline, **changes)
  assert_same_steps(chosen, (alone_of if name in APART else plain_of)(chosen))


TWO = MeshConfig(stage=2, data=1)
FOUR = MeshConfig(stage=4, data=2)
EXPERTS = MeshConfig(stage=2, data=2, expert=2)
TENSOR = dict.fromkeys(
  ('act_heads', 'act_vocab', 'heads', 'mlp', 'vocab', 'expert_mlp'), ('model',)
)
DATA = tiny_mla.get_config().data
RUNS: dict[str, Any] = {
  # Three expert layers on two stages: one of them is left over.
  'uneven': ('mla', EXPERTS, 4, GPipe(microbatches=2), {'dispatch': AllToAll(), 'remat': REMAT}),
  'local': ('mla', EXPERTS, 6, GPipe(microbatches=2), {}),
  'interleaved': ('mla', TWO, 6, Interleaved(microbatches=4), {}),
  'four': ('mla', FOUR, 5, GPipe(microbatches=4), {}),
  # Fewer microbatches than stages.
  'four_rounds': ('mla', FOUR, 9, Interleaved(microbatches=2), {'dispatch': AllGather()}),
  'one': ('mla', MeshConfig(stage=2, data=4), 3, GPipe(microbatches=1), {}),
  'three': (
    'mla',
    TWO,
    3,
    GPipe(microbatches=3),
    {'data': dataclasses.replace(DATA, length=LENGTH, batch_size=12)},
  ),
  'accumulation': ('mla', TWO, 3, GPipe(microbatches=2), {'microbatches': 2}),
  'tensor': (
    'mla',
    MeshConfig(stage=2, data=2, model=2),
    3,
    GPipe(microbatches=2),
    {'rules': dataclasses.replace(PIPELINE, **TENSOR)},
  ),
  'whole_outside': (
    'mla',
    EXPERTS,
    3,
    GPipe(microbatches=2),
    {'rules': dataclasses.replace(PIPELINE, batch=('replica', 'data', 'expert'))},
  ),
  'square_root': ('mla', TWO, 10, GPipe(microbatches=2), {'remat': SquareRoot()}),
  'save': ('mla', TWO, 3, Interleaved(microbatches=2, rounds=1), {'remat': Save()}),
  'mhc': ('mhc', TWO, 5, Interleaved(microbatches=2), {}),
  'v4': ('v4', MeshConfig(stage=2, data=2), 6, GPipe(microbatches=2), {}),
  'v4_rounds': (
    'v4',
    EXPERTS,
    10,
    Interleaved(microbatches=2),
    {'dispatch': AllToAll(), 'remat': REMAT},
  ),
  'caption': ('caption', EXPERTS, 3, GPipe(microbatches=2), {}),
  'capacity': ('mla', EXPERTS, 5, GPipe(microbatches=2), {'dispatch': Capacity(factor=0.8)}),
  'noise': ('noise', EXPERTS, 5, Interleaved(microbatches=2), {}),
}
APART = ('capacity', 'noise')
"""What depends on which tokens are in a microbatch: compared with the same microbatches."""


@pytest.mark.slow
@pytest.mark.parametrize('name', RUNS)
def test_stages_change_nothing(name):
  """Two steps in stages are those of one device without any."""
  run(name)


@pytest.mark.slow
def test_bfloat16():
  """Runs, with a loss near that of one device; XLA for CPUs once refused such sums over stages."""
  chosen = experiment(
    'mla', EXPERTS, 4, pipeline=GPipe(microbatches=2), precision=BFloat16(), remat=REMAT
  )
  for one, other in zip(
    two_steps(chosen, plain_of(chosen)), two_steps(plain_of(chosen), plain_of(chosen))
  ):
    assert one[2]['loss'] == pytest.approx(other[2]['loss'], rel=1e-2)
    assert one[2]['grad_norm'] == pytest.approx(other[2]['grad_norm'], rel=3e-2)


PLACES = {
  'none': (None, ONE),
  'two': (GPipe(microbatches=2), TWO),
  'rounds': (Interleaved(microbatches=2), TWO),
  'four': (GPipe(microbatches=2), FOUR),
}


@pytest.mark.parametrize(('old', 'new'), [('two', 'none'), ('rounds', 'four'), ('none', 'rounds')])
def test_a_checkpoint_moves_between_numbers_of_stages(old, new, tmp_path):
  """Six expert layers: weights, moments and biases come back at their canonical addresses."""
  made = [
    program(experiment('mla', mesh, 7, pipeline=pipeline))
    for pipeline, mesh in (PLACES[old], PLACES[new])
  ]
  plans = [segments_of(each.experiment) for each in made]
  assert plans[0] != plans[1]
  state = start_like(made[0], program(plain_of(made[0].experiment)))
  # Moments that differ from weight to weight.
  clip, moments, *rest = state.opt_state
  moments = moments._replace(mu=jax.tree.map(lambda x: 2 * x, state.params))
  state = state.replace(opt_state=(clip, moments, *rest))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, state, {}, to_json(made[0].experiment))
    checkpoints.wait()
    found = resume_state(made[1], checkpoints, 0)
  for tree, other in (
    (found.params, state.params),
    (found.opt_state[1].mu, moments.mu),
    (found.buffers, state.buffers),
  ):
    one, two = (
      flatten(canonical(jax.device_get(x), plan))
      for x, plan in zip((tree, other), reversed(plans), strict=True)
    )
    assert one.keys() == two.keys()
    for address, array in two.items():
      np.testing.assert_array_equal(one[address], array, err_msg=address)


@pytest.mark.parametrize(
  ('mesh', 'changes', 'message'),
  [
    (TWO, {'pipeline': None}, r'mesh.stage is 2, but pipeline is None: every stage would hold'),
    (TWO, {'rules': FSDP}, r'pipeline GPipe: rules.stage is \(\), by which no layers lie on'),
    (TWO, {'pipeline': GPipe(microbatches=3)}, r'8 rows cannot be cut into 3 microbatches'),
    (EXPERTS, {'pipeline': GPipe(microbatches=4)}, r'4 microbatches that 4 devices share'),
    (TWO, {'microbatches': 4, 'pipeline': GPipe(microbatches=4)}, r'2 rows cannot be cut into 4'),
    (FOUR, {}, r'pipeline GPipe: 4 stages and 1 rounds need .* 4 times in a row; .* 2 times'),
  ],
)
def test_what_does_not_fit_is_refused(mesh, changes, message):
  """Before anything is compiled, in a sentence."""
  chosen = experiment('mla', mesh, 3, **{'pipeline': GPipe(microbatches=2), **changes})
  with pytest.raises(ConfigError, match=message):
    program(chosen)


def test_weights_lie_on_their_stage():
  """Each device holds the layers of its stage; what is left over is on all of them."""
  made = program(experiment('mla', TWO, 6, pipeline=Interleaved(microbatches=2)))
  shapes = flatten(made.abstract_state.params)
  name = 'block_0/feed_forward/router/weight'
  held = {
    address: leaf.sharding.shard_shape(leaf.shape)[0]
    for address, leaf in shapes.items()
    if address.endswith(name)
  }
  assert held == {
    f'stack/segment_1/{name}': 1,
    f'stack/segment_2/{name}': 1,
    f'stack/segment_3/{name}': 32,
  }


def test_overrides():
  """A pipeline is one more kind in one more field."""
  assignments = [
    ('pipeline', 'Interleaved(microbatches=4, rounds=3)'),
    ('mesh.stage', '2'),
    ('rules', 'PIPELINE'),
  ]
  found, _ = override_from_text(tiny_mla.get_config(), assignments)
  assert found.pipeline == Interleaved(microbatches=4, rounds=3)
  assert found.rules == PIPELINE
  assert from_json(to_json(found)) == found
