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
from deepseek_jax.core.tree import flatten
from deepseek_jax.data.batch import Batch
from deepseek_jax.layers.moe.balance import SequenceBalance
from deepseek_jax.layers.moe.dispatch.local import Local
from deepseek_jax.models.decoder import canonical, grouped
from deepseek_jax.models.pipeline import GPipe, Interleaved
from deepseek_jax.models.plan import Segment
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import Constant
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import PIPELINE
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.step import Program, build_program, segments_of
from tests.parity.test_sharded import TOLERANCE, assert_same, packed, pictured, start

ROWS, LENGTH = 8, 32
ONE = MeshConfig(data=1)
CONFIGS = {'mla': tiny_mla, 'mhc': tiny_mhc, 'v4': tiny_v4, 'caption': tiny_caption}


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
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), made.abstract_state)
  state = zeros.replace(
    params=regroup(state.params, old, new), buffers=regroup(state.buffers, old, new)
  )
  return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, made.abstract_state))


def batch_of(seed: int, kind: str) -> Batch:
  """Rows of packed documents of very unequal length; with pictures where there are any."""
  return pictured(seed) if kind == 'image' else packed(seed)


@functools.cache
def two_steps(chosen: Experiment, plain: Experiment) -> list[tuple[dict, dict, dict]]:
  """Arrays of the state by canonical address, what was observed, and scalars, of two steps."""
  made, like = program(chosen), program(plain)
  step = made.step.compile(made.abstract_state, made.abstract_batch())
  segments, state, results = segments_of(chosen), start_like(made, like), []
  name = lambda tree: canonical(jax.device_get(tree), segments)  # noqa: E731
  image = 'image' if chosen.data.image_shape is not None else 'text'
  for seed in (1, 2):
    state, metrics = step(state, jax.device_put(batch_of(seed, image), made.batch_sharding))
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


def run(name: str) -> None:
  """Compares one of `RUNS` with the run without stages on one device."""
  kind, mesh, depth, pipeline, changes = RUNS[name]
  chosen = experiment(kind, mesh, depth, pipeline=pipeline, **changes)
  assert_same_steps(chosen, plain_of(chosen))


EXPERTS = MeshConfig(stage=2, data=2, expert=2)
RUNS = {
  # Five expert layers on two stages: one of them is left over.
  'uneven': ('mla', EXPERTS, 6, GPipe(microbatches=2), {}),
  'interleaved': ('mla', MeshConfig(stage=2, data=1), 6, Interleaved(microbatches=4), {}),
  'v4': ('v4', MeshConfig(stage=2, data=2), 6, GPipe(microbatches=2), {}),
}


@pytest.mark.parametrize('name', RUNS)
def test_stages_change_nothing(name):
  """Two steps in stages are those of one device without any."""
  run(name)
