"""A training step on a mesh of eight devices is the step on one device.

What is compared: the loss, the gradient norm, both moments of Adam, all updated parameters, and
the routers' selection biases, after one step and after two.

Adam's first update is g / (|g| + ε) times the learning rate: with its usual ε of 1e-8 that is
nearly the sign of g, so that an entry whose true gradient is zero but for rounding moves by the
whole learning rate in a direction of chance, on one device as on eight. No tolerance on updated
parameters would then mean anything. Here ε is as large as the learning rate, which makes the update
about as precise as the gradient; and the first moment after one step, (1 - β₁) times the clipped
gradient, is compared on its own, so that each gradient is held to the tolerance.
"""

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
import pytest

from configs import (
  tiny_caption,
  tiny_dsa,
  tiny_gated,
  tiny_mha,
  tiny_mhc,
  tiny_mla,
  tiny_nsa,
  tiny_recurrent,
  tiny_top_k,
  tiny_v4,
  tiny_window,
)
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.tree import flatten
from deepseek_jax.data.batch import Batch, Media
from deepseek_jax.layers.moe.balance import SequenceBalance
from deepseek_jax.layers.moe.dispatch.all_gather import AllGather
from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import Constant
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import EXPERT, FSDP, TENSOR
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.step import Program, build_program

ROWS, LENGTH = 8, 32
TOLERANCE = 1e-5

OFTEN = {
  'mla': ('tensor',),
}
"""Under which presets a kind is run every time; all else is slow."""

EXPERTS = 4
"""Routed experts of every config here, at least."""

SHORT = {'depth': 2, 'dense_layers': 0, 'mtp': None}

LAYOUTS = {
  'single': (FSDP, MeshConfig(data=1)),
  'fsdp': (FSDP, MeshConfig(data=8)),
  'tensor': (TENSOR, MeshConfig(data=2, model=4)),
  'expert': (EXPERT, MeshConfig(data=2, expert=4)),
  'all_to_all': (EXPERT, MeshConfig(data=2, expert=4)),
  'all_gather': (EXPERT, MeshConfig(data=2, expert=4)),
}
DISPATCHES = {'all_to_all': AllToAll(chunks=2), 'all_gather': AllGather()}
CONFIGS = {
  'mla': tiny_mla,
  'window': tiny_window,
  'gated': tiny_gated,
  'top_k': tiny_top_k,
  'dsa': tiny_dsa,
  'mha': tiny_mha,
  'mhc': tiny_mhc,
  'nsa': tiny_nsa,
  'recurrent': tiny_recurrent,
  'v4': tiny_v4,
  'caption': tiny_caption,
}


def experiment(kind: str, layout: str, microbatches: int = 1) -> Experiment:
  """MLA in the whole tiny model; the other kinds in two scanned expert layers, which is quicker."""
  base = CONFIGS[kind].get_config()
  text = base.model.text if kind == 'caption' else base.model
  # Heavy enough for a wrong divisor of the balance loss to show.
  sparse = dataclasses.replace(
    text.feed_forward,
    balance=SequenceBalance(weight=0.1),
    dispatch=DISPATCHES.get(layout, text.feed_forward.dispatch),
  )
  model = dataclasses.replace(text, feed_forward=sparse)
  if kind != 'mla':
    short = {'depth': 3, 'first_layers': 1} if kind == 'v4' else SHORT
    model = dataclasses.replace(model, **short)
  if kind == 'caption':
    model = dataclasses.replace(base.model, text=model)
  rules, mesh = LAYOUTS[layout]
  return dataclasses.replace(
    base,
    model=model,
    data=dataclasses.replace(base.data, length=LENGTH, batch_size=ROWS),
    optimizer=AdamW(peak_lr=1e-2, epsilon=1e-2),
    schedule=Constant(),
    rules=rules,
    mesh=mesh,
    microbatches=microbatches,
  )


@functools.cache
def program(kind: str, layout: str, microbatches: int = 1) -> Program:
  """The program of an experiment, on as many devices as its layout has."""
  chosen = experiment(kind, layout, microbatches)
  devices = math.prod(size or 1 for size in dataclasses.asdict(chosen.mesh).values())
  return build_program(chosen, jax.devices()[:devices])


def start(made: Program) -> TrainState:
  """The same made-up state for every layout; scales and selection biases are not trivial."""
  generator = np.random.default_rng(0)

  def parameter(path, leaf):
    if path[-1].key == 'scale':
      return generator.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    if path[-1].key == 'selection_bias':
      return generator.normal(0, 0.05, leaf.shape).astype(np.float32)
    if path[-1].key == 'table':
      # Of a hash router: different experts for each token.
      experts = np.tile(np.arange(EXPERTS, dtype=leaf.dtype), (*leaf.shape[:-1], 1))
      return generator.permuted(experts, axis=-1)[..., : leaf.shape[-1]]
    return generator.normal(0, 0.2, leaf.shape).astype(np.float32)

  abstract = made.abstract_state
  state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
  state = state.replace(
    params=jax.tree_util.tree_map_with_path(parameter, abstract.params),
    buffers=jax.tree_util.tree_map_with_path(parameter, abstract.buffers),
  )
  return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract))


def packed(seed: int) -> Batch:
  """Rows of packed documents with very unequal counts of targets; one row is padding alone."""
  generator = np.random.default_rng(seed)
  shape = (ROWS, LENGTH)
  tokens, targets = (generator.integers(3, 259, shape).astype(np.int32) for _ in range(2))
  segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  documents = [(32,), (2, 1), (5, 9, 18), (), (20, 11), (1,), (7, 7, 7, 7), (30,)]
  for row, lengths in enumerate(documents):
    ends = np.cumsum([0, *lengths])
    for number, (begin, end) in enumerate(itertools.pairwise(ends), start=1):
      segments[row, begin:end] = number
      positions[row, begin:end] = np.arange(end - begin)
  real = segments > 0
  return Batch(
    tokens=tokens * real,
    targets=targets * real,
    weights=real.astype(np.float32),
    positions=positions,
    segments=segments,
    documents=np.where(real, segments, -1).astype(np.int32),
  )


def pictured(seed: int) -> Batch:
  """The rows of `packed`, some of them with a picture among the tokens."""
  batch, generator = packed(seed), np.random.default_rng(seed + 100)
  places = np.full((ROWS, LENGTH), -1, np.int32)
  for row, begin in ((0, 1), (2, 14), (4, 0), (7, 20)):
    places[row, begin : begin + 4] = range(4)
  return dataclasses.replace(
    batch,
    weights=batch.weights * (places < 0),
    media={
      'image': Media(
        values=generator.integers(0, 256, (ROWS, 1, 64, 64, 3), np.uint8),
        counts=np.full((ROWS, 1), 64, np.int32),
      )
    },
    placeholders=places,
  )


@functools.cache
def two_steps(kind: str, layout: str, microbatches: int = 1) -> list[tuple[TrainState, dict]]:
  """State and metrics after each of two steps, on the host, and the first state's arrays."""
  made = program(kind, layout, microbatches)
  step = made.step.compile(made.abstract_state, made.abstract_batch())
  state, results = start(made), []
  batches = pictured if kind == 'caption' else packed
  for seed in (1, 2):
    state, metrics = step(state, jax.device_put(batches(seed), made.batch_sharding))
    check_pieces(state, made)
    results.append(jax.device_get((state, metrics)))
  return results


def check_pieces(state: TrainState, made: Program) -> None:
  """Every array lies on its devices in pieces counted by hand from axes, rules and mesh."""
  rules, sizes = made.experiment.rules, made.experiment.mesh.sizes(made.mesh.size)
  moments = state.opt_state[1]
  for tree in (state.params, moments.mu, moments.nu):
    for address, array in flatten(tree).items():
      names = flatten(made.axes)[address]
      expected = tuple(
        size // math.prod(sizes[axis] for axis in (getattr(rules, name) if name else ()))
        for size, name in zip(array.shape, names, strict=True)
      )
      assert len(array.addressable_shards) == made.mesh.size
      assert {shard.data.shape for shard in array.addressable_shards} == {expected}, address


def assert_same(found, expected, message: str, tolerance: float = TOLERANCE) -> None:
  """Every array within the tolerance, relative to its largest entry, or a thousandth of any.

  What is far smaller than the rest is a sum of terms that cancel, which are known to so much. Gates
  and base of hyper-connections are such sums over all tokens and channels at once.
  """
  found, expected = flatten(found), flatten(expected)
  assert found.keys() == expected.keys()
  most = max(np.abs(array).max() for array in expected.values()) if expected else 0
  for address, array in expected.items():
    largest = np.abs(array).max()
    assert largest > 0, f'{message}: {address} is all zero'
    own, of_any = (20, 2e-2) if address.endswith(('/gates', '/base')) else (1, 1e-3)
    limit = tolerance * max(own * largest, of_any * most)
    difference = np.abs(found[address] - array).max()
    assert difference <= limit, f'{message}: {address} differs by {difference}, limit {limit}'


def assert_same_steps(found, expected) -> None:
  """Compares everything that two steps returned."""
  for number, ((state, metrics), (state_1, metrics_1)) in enumerate(zip(found, expected), start=1):
    where = f'after step {number}'
    assert int(state.step) == int(state_1.step) == number
    for name in metrics_1.keys() - {'observed', 'buffers', 'guard'}:
      assert metrics[name] == pytest.approx(metrics_1[name], rel=TOLERANCE), f'{where}: {name}'
    moments, moments_1 = state.opt_state[1], state_1.opt_state[1]
    assert_same(moments.mu, moments_1.mu, f'{where}: mean gradient')
    # The relative error of a square is twice that of the number.
    assert_same(moments.nu, moments_1.nu, f'{where}: mean squared gradient', 2 * TOLERANCE)
    assert_same(state.params, state_1.params, f'{where}: parameters')
    # What the guard judges by is the same number everywhere, and so is its verdict.
    np.testing.assert_allclose(state.guard.mean, state_1.guard.mean, rtol=TOLERANCE)
    assert int(state.guard.skipped) == int(metrics['guard']['fault']) == 0
    # Loads are counts: one token that goes to another expert is a difference.
    # What is observed of an indexer is a mean of rounded numbers.
    for address, found in flatten(metrics['observed']).items():
      tolerance = 1e-3 if '/indexer/' in address else 0
      expected = flatten(metrics_1['observed'])[address]
      np.testing.assert_allclose(found, expected, rtol=tolerance, err_msg=address)
    assert_same(state.buffers, state_1.buffers, f'{where}: buffers')


PAIRS = [
  pytest.param(
    kind,
    layout,
    marks=[] if layout in OFTEN.get(kind, ()) else [pytest.mark.slow],
  )
  for layout in ('fsdp', 'tensor', 'expert')
  for kind in CONFIGS
]


@pytest.mark.parametrize(('kind', 'layout'), PAIRS)
def test_a_mesh_changes_nothing(kind, layout):
  """Two steps under each preset are those of one device."""
  assert_same_steps(two_steps(kind, layout), two_steps(kind, 'single'))


@pytest.mark.slow
@pytest.mark.parametrize('layout', DISPATCHES)
def test_a_dispatch_changes_nothing(layout):
  """Nor does sending tokens to their experts, in a scan, under recomputation, twice a step."""
  assert_same_steps(two_steps('mla', layout, 1), two_steps('mla', 'single'))


@pytest.mark.slow
@pytest.mark.parametrize(('layout', 'microbatches'), [('single', 2), ('tensor', 4)])
def test_accumulation_changes_nothing(layout, microbatches):
  """Microbatches with very unequal counts of targets add up to the batch; also on a mesh.

  Row j goes to microbatch j modulo their number.
  """
  counts = packed(1).weights.sum(axis=1).reshape(-1, microbatches).sum(axis=0)
  assert counts.max() > 1.5 * counts.min()
  assert_same_steps(two_steps('mla', layout, microbatches), two_steps('mla', 'single'))


def test_the_comparison_sees_a_small_error():
  """What the tests above would say if one row's gradient were a thousandth off."""
  (state, _), _ = two_steps('mla', 'single')
  moments = state.opt_state[1].mu
  wrong = jax.tree.map(lambda x: x * np.float32(1 + 1e-3), moments)
  with pytest.raises(AssertionError, match='differs by'):
    assert_same(wrong, moments, 'scaled')


def test_init_is_the_same_on_a_mesh():
  """Each device makes its own piece of every weight, from the same random numbers."""
  states = []
  for layout in ('single', 'tensor'):
    made = program('window', layout)
    key = jax.random.key(3)
    state = made.init.compile(key)(key)
    check_pieces(state, made)
    states.append(jax.device_get(state.params))
  assert_same(*reversed(states), 'fresh parameters')


@pytest.mark.parametrize(
  ('layout', 'rows', 'microbatches', 'message'),
  [
    ('fsdp', 12, 1, r'gives 12 rows, not divisible by the 8 devices'),
    ('expert', 4, 1, r'gives 4 rows, not divisible by the 8 devices'),
    ('tensor', 9, 1, r'gives 9 rows, not divisible by the 2 devices'),
    ('fsdp', 16, 4, r'gives 4 rows in each of 4 microbatches, not divisible by the 8 devices'),
  ],
)
def test_rows_that_the_mesh_does_not_divide(layout, rows, microbatches, message):
  """Refused when the program is built, which compiles nothing."""
  chosen = experiment('mla', layout)
  data = dataclasses.replace(chosen.data, batch_size=rows)
  chosen = dataclasses.replace(chosen, data=data, microbatches=microbatches)
  with pytest.raises(ConfigError, match=message):
    build_program(chosen)


def test_heads_that_the_mesh_does_not_divide():
  """Every weight with a heads axis is listed once, with its address; no other is."""
  chosen = experiment('mla', 'tensor')
  attention = dataclasses.replace(chosen.model.attention, heads=6)
  chosen = dataclasses.replace(chosen, model=dataclasses.replace(chosen.model, attention=attention))
  with pytest.raises(ConfigError) as caught:
    build_program(chosen)
  found = [message.split(':')[0] for message in caught.value.messages]
  blocks = ('stack/segment_0/block_0', 'stack/segment_1/block_0', 'mtp_0/block')
  weights = ('key_value_up', 'output', 'query_up')
  assert sorted(found) == sorted(f'{b}/attention/{w}' for b in blocks for w in weights)
  assert "not divisible by the 4 devices of mesh axis 'model'" in caught.value.messages[0]
