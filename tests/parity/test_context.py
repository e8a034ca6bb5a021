"""A step on devices that share the tokens of a row is the step on one device.

What is compared: the loss, the losses of further tokens and of layers, the gradient of every
weight, and the loads of experts; and, for evaluation, every sum.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from configs import (
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
from deepseek_jax.core.override import override
from deepseek_jax.core.tree import flatten
from deepseek_jax.data.batch import Batch
from deepseek_jax.layers.attention.sparse import Shared
from deepseek_jax.layers.context import packed_context
from deepseek_jax.layers.context_parallel import AllGather as Gathered
from deepseek_jax.layers.context_parallel import ContextParallel, Partitioned, Ring, ZigZag
from deepseek_jax.layers.moe.dispatch.all_gather import AllGather
from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.layers.moe.dispatch.capacity import Capacity
from deepseek_jax.layers.moe.router.expert_attention import ExpertAttention
from deepseek_jax.models.mtp import MTP
from deepseek_jax.models.pipeline import GPipe
from deepseek_jax.models.remat import Compressed, EveryLayer, Save, SquareRoot
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import CONTEXT, POD
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.gradients import make_gradients
from deepseek_jax.train.step import build_program, make_evaluate

ROWS, LENGTH = 8, 32
TOLERANCE = 1e-5
CONFIGS = {
  'mla': tiny_mla,
  'mha': tiny_mha,
  'window': tiny_window,
  'gated': tiny_gated,
  'top_k': tiny_top_k,
  'dsa': tiny_dsa,
  'mhc': tiny_mhc,
  'nsa': tiny_nsa,
  'recurrent': tiny_recurrent,
  'v4': tiny_v4,
}
DOCUMENTS = ([32], [2, 1], [5, 9, 18], [], [20, 11], [1], [7, 7, 7, 7], [17, 15])
"""Rows of documents that end at, before and behind the edges of devices; one is padding alone."""
ZIGZAG = Ring(order=ZigZag())
FOUR = MeshConfig(data=2, seq=4)


def experiment(kind: str, **changes: Any) -> Experiment:
  """Two scanned expert layers and one that looks two tokens ahead; V4 has a plan of its own."""
  base = CONFIGS[kind].get_config()
  short: dict[str, Any] = {'depth': 3, 'first_layers': 1} if kind == 'v4' else {}
  short = short or {'depth': 2, 'dense_layers': 0, 'mtp': MTP(depth=1)}
  # Its blocks are longer than what a device has of these rows.
  if kind == 'gated':
    short['attention'] = dataclasses.replace(base.model.attention, block=4, window=3)
  model = dataclasses.replace(base.model, **short)
  sparse = {name: changes.pop(name) for name in ('dispatch', 'router') if name in changes}
  if sparse:
    experts = dataclasses.replace(model.feed_forward, **sparse)
    model = dataclasses.replace(model, feed_forward=experts)
  data = dataclasses.replace(base.data, length=LENGTH, batch_size=ROWS)
  return dataclasses.replace(base, model=model, data=data, **changes)


def on_mesh(chosen: Experiment, parallel: ContextParallel, mesh: MeshConfig) -> Experiment:
  """The same run, with rows that devices share."""
  return dataclasses.replace(chosen, rules=CONTEXT, mesh=mesh, context_parallel=parallel)


def packed() -> Batch:
  """Rows of packed documents."""
  generator = np.random.default_rng(1)
  context = packed_context(DOCUMENTS, LENGTH)
  segments, real = np.asarray(context.segments), np.asarray(context.real)
  tokens, targets = (generator.integers(3, 259, real.shape).astype(np.int32) for _ in range(2))
  return Batch(
    tokens=tokens * real,
    targets=targets * real,
    weights=(real * generator.uniform(0.5, 1, real.shape)).astype(np.float32),
    positions=np.asarray(context.positions),
    segments=segments,
    documents=np.where(real, segments, -1).astype(np.int32),
  )


def start(made):
  """The same made-up state for every layout; scales and selection biases are not trivial."""
  generator = np.random.default_rng(0)

  def draw(path, leaf):
    if np.issubdtype(leaf.dtype, np.integer):
      return generator.integers(0, 8, leaf.shape).astype(leaf.dtype)
    low, high = (0.5, 1.5) if path[-1].key == 'scale' else (-0.3, 0.3)
    return generator.uniform(low, high, leaf.shape).astype(np.float32)

  abstract = made.abstract_state
  state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
  state = state.replace(
    params=jax.tree_util.tree_map_with_path(draw, abstract.params),
    buffers=jax.tree_util.tree_map_with_path(draw, abstract.buffers),
  )
  return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract))


def results(chosen: Experiment, evaluate: bool = False) -> dict[str, np.ndarray]:
  """Gradients, losses and observations of a batch by name; or what evaluation counts."""
  devices = np.prod([size or 1 for size in dataclasses.asdict(chosen.mesh).values()])
  made = build_program(chosen, jax.devices()[:devices])
  state, batch = start(made), jax.device_put(packed(), made.batch_sharding)
  with jax.set_mesh(made.mesh):
    if evaluate:
      found = jax.jit(make_evaluate(chosen, made.decoder))(state.params, state.buffers, batch)
      return jax.device_get(found)
    run = jax.jit(make_gradients(chosen, made.decoder), static_argnums=2)
    (grads, _), scalars, observed = run(state, batch, None)
  return flatten(jax.device_get({'gradient': grads, 'scalar': scalars, 'observed': observed}))


alone = functools.cache(results)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
  """Every array within the tolerance, relative to its largest entry; counts are equal."""
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    # What is observed of an indexer is a mean of rounded numbers.
    share = 1e-3 if 'observed/' in name and '/indexer/' in name else TOLERANCE
    limit = 0 if name.endswith('/load') else share * max(np.abs(array).max(), 1e-6)
    difference = np.abs(found[name] - array).max()
    assert difference <= limit, f'{name} differs by {difference}, limit {limit}'


def compare(kind: str, parallel: ContextParallel, mesh: MeshConfig = FOUR, **changes: Any) -> None:
  """Compares a step on a mesh with the step on one device."""
  chosen = experiment(kind, **changes)
  single = dataclasses.replace(chosen, mesh=MeshConfig(data=1))
  assert_same(results(on_mesh(chosen, parallel, mesh)), alone(single))


@pytest.mark.slow
def test_zigzag_ring_of_latents():
  """MLA, MTP across the edges of devices, packed rows, recomputation."""
  compare('mla', ZIGZAG, remat=EveryLayer())


@pytest.mark.slow
@pytest.mark.parametrize('kind', [kind for kind in CONFIGS if kind != 'v4'])
@pytest.mark.parametrize('devices', [2, 4, 8])
def test_every_kind(kind, devices):
  """Two, four and eight devices share a row; windows are longer than what a device has of it."""
  compare(kind, Ring(), MeshConfig(seq=devices))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['mla', 'mha', 'mhc', 'dsa', 'top_k'])
@pytest.mark.parametrize('parallel', [ZIGZAG, Gathered(order=ZigZag()), Gathered(), Partitioned()])
def test_every_form(kind, parallel):
  """The forms of attention to everything, and orders, where any will do."""
  compare(kind, parallel)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'mesh'),
  [
    ('mla', MeshConfig(data=2, seq=2, model=2)),
    ('mha', MeshConfig(data=2, seq=2, model=2)),
    ('window', MeshConfig(seq=4, model=2)),
    ('mla', MeshConfig(seq=2, expert=4)),
    ('dsa', MeshConfig(seq=2, expert=4)),
  ],
)
def test_with_other_axes(kind, mesh):
  """Heads over `model`, experts over `expert`."""
  compare(kind, Ring(), mesh)


@pytest.mark.slow
@pytest.mark.parametrize('dispatch', [AllToAll(chunks=2), AllGather(), Capacity(factor=8.0)])
def test_with_every_dispatch(dispatch):
  """Tokens that travel to their experts."""
  compare('mla', Ring(), MeshConfig(seq=2, expert=4), dispatch=dispatch)


@pytest.mark.slow
@pytest.mark.parametrize(
  'change',
  [
    {'remat': SquareRoot()},
    {'remat': Save()},
    {'remat': Compressed()},
    {'microbatches': 2},
    {'router': ExpertAttention(dim=8)},
  ],
)
def test_with_what_steps_do(change):
  """Recomputation, accumulation, and a router that looks at what was before.

  `Compressed` rounds what it recomputes from, on every mesh alike.
  """
  order = Ring() if 'router' in change else ZIGZAG
  compare('mla', order, **change)


@pytest.mark.slow
def test_shared_choices():
  """Blocks of queries that choose together."""
  base = tiny_dsa.get_config().model.attention
  attention = dataclasses.replace(base, sharing=Shared(block=4, window=3))
  chosen = experiment('dsa')
  model = dataclasses.replace(chosen.model, attention=attention)
  chosen = dataclasses.replace(chosen, model=model)
  found = results(on_mesh(chosen, Ring(), FOUR))
  assert_same(found, alone(dataclasses.replace(chosen, mesh=MeshConfig(data=1))))


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'parallel'), [('mla', ZIGZAG), ('dsa', Ring())])
def test_evaluation(kind, parallel):
  """Sums of nats, and of what is proposed right a place later in the row."""
  chosen = experiment(kind)
  found = results(on_mesh(chosen, parallel, FOUR), evaluate=True)
  expected = results(dataclasses.replace(chosen, mesh=MeshConfig(data=1)), evaluate=True)
  assert expected['mtp_targets'].sum() > 0
  assert_same(found, expected)


REFUSED = [
  ('window', {}, ZIGZAG, 'attention Window: needs the tokens before its own beside them'),
  ('v4', {}, ZIGZAG, 'attention CSA: needs the tokens before its own beside them'),
  ('recurrent', {}, ZIGZAG, 'attention Recurrent: needs the tokens of a segment beside them'),
  ('nsa', {}, ZIGZAG, 'attention NSA: needs the tokens of a span beside them'),
  ('mla', {'dispatch': Capacity()}, ZIGZAG, 'Capacity needs the tokens of a row'),
  ('mla', {'router': ExpertAttention(dim=8)}, ZIGZAG, 'ExpertAttention needs the tokens of a row'),
]


@pytest.mark.parametrize(('kind', 'changes', 'parallel', 'message'), REFUSED)
def test_what_is_refused(kind, changes, parallel, message):
  """Before anything is compiled, with the reason and what to write instead."""
  errors = on_mesh(experiment(kind, **changes), parallel, FOUR).check(8)
  assert any(message in error and 'use Contiguous()' in error for error in errors), errors


def test_what_was_not_found_equal():
  """V4 as a whole, and heads apart where the compiler would have to partition them."""
  (error,) = on_mesh(experiment('v4'), Ring(), FOUR).check(8)
  assert 'DeepSeekV4 was not found equal' in error
  apart = MeshConfig(data=2, seq=2, model=2)
  for kind in ('dsa', 'top_k', 'gated', 'nsa'):
    (error,) = on_mesh(experiment(kind), Ring(), apart).check(8)
    assert 'which the compiler cannot partition for it' in error
  for kind in ('mla', 'mha', 'window'):
    assert on_mesh(experiment(kind), Ring(), apart).check(8) == []
  staged = dataclasses.replace(
    experiment('dsa'), pipeline=GPipe(microbatches=2), rules=POD, mesh=MeshConfig(stage=2, seq=2)
  )
  (error,) = [error for error in staged.check(8) if 'attention' in error]
  assert 'lies in stages where devices share a row' in error


def test_lengths_and_blocks_that_do_not_fit():
  """Rows, chunks and blocks that devices cannot hold; an axis that no rule uses."""
  chosen = experiment('mla')

  def errors(length, parallel, chosen=chosen, **changes):
    data = dataclasses.replace(chosen.data, length=length)
    return dataclasses.replace(on_mesh(chosen, parallel, FOUR), **({'data': data} | changes)).check(
      8
    )

  assert errors(32, ZIGZAG) == []
  assert errors(30, Ring()) == [
    "data.length is 30, not divisible by the 4 devices that share a sequence (rules.seq ('seq',))"
  ]
  (error,) = errors(36, ZIGZAG)
  assert 'order ZigZag cuts data.length 36 into 8 chunks for 4 devices' in error
  (error,) = errors(24, Ring(), experiment('gated'))
  assert 'Gated: `block` is 4, which does not divide the 6 tokens of a row' in error
  (error,) = errors(32, Ring(), rules=dataclasses.replace(chosen.rules, seq=()))
  assert 'mesh.seq is 4, but no rule has anything on that axis' in error


def test_a_kind_that_says_nothing():
  """A kind of somebody's own is left to the compiler, in the order of the row alone."""

  class Own:
    """What a notebook may put in the field."""

    heads = 4

    def build(self, name=None):
      raise NotImplementedError

    empty_cache = cache_axes = mixing_flops = build

  chosen = experiment('mla')
  chosen = dataclasses.replace(chosen, model=dataclasses.replace(chosen.model, attention=Own()))
  assert on_mesh(chosen, Ring(), FOUR).check(8) == []
  (error,) = on_mesh(chosen, ZIGZAG, FOUR).check(8)
  assert 'Own: does not say that it takes tokens in the order ZigZag' in error


def test_command_line():
  """The preset, the axis and the form in the grammar of overrides."""
  changes = {
    'rules': 'CONTEXT',
    'mesh.seq': 4,
    'context_parallel': 'AllGather(order=ZigZag())',
  }
  changed, _ = override(tiny_mla.get_config(), changes)
  assert changed.rules == CONTEXT
  assert changed.context_parallel == Gathered(order=ZigZag())
  assert changed.mesh.sizes(8)['data'] == 2
  assert changed.check(8) == []
  with pytest.raises(ConfigError, match='Ring'):
    override(tiny_mla.get_config(), {'context_parallel': 'Rind()'})
