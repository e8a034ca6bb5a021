"""A rough plan without compiling: for choosing what to compile.

The model, in full:

- State: exact, from shapes and rules. Gradients: a float32 copy of the weights, two where
  microbatches are summed.
- Activations: what `remat` says that it remembers, of every layer, in the compute dtype.
- Temporaries: the largest of one layer's working set, forward and backward (queries, keys, values
  and their gradients; the room of the experts' rows, its hidden units, twice), and of the logits of
  a chunk; and two layers' weights, gathered.
- Work: three times the model's forward FLOPs; the layers' once more where `remat` recomputes, but
  for the last product of a dense feed-forward, which no gradient needs; and one and a half times
  the mixing of attention, whose kernels make their scores again for each of two gradients.
- Memory traffic: the state read and written, gradients read and written, gathered weights read in
  every pass of every microbatch, and 24 times the stream of each layer and pass.
- Exchanges, of each microbatch: weights gathered in every pass (compute dtype) and their gradients
  scattered along the axes that cut them and carry rows; experts' rows there and back in every pass;
  two sums of the stream a layer and pass where `model` cuts heads. Then gradients along the axes
  that carry rows and do not cut the weight.
- Time: the longer of work and memory traffic, plus the exchange of experts' rows and of the stream,
  which wait for each other, plus what the others take longer than the work they can hide behind.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.cost import Weight, forward_flops, making_flops, weights_of
from deepseek_jax.models.decoder import init_variables, plan_segments
from deepseek_jax.models.remat import Compressed, Save, SquareRoot
from deepseek_jax.pods.collective import Collective, collective_seconds, lay_out
from deepseek_jax.pods.estimate import Machine, machine_of
from deepseek_jax.pods.topology import Topology, places
from deepseek_jax.sharding.mesh import MESH_AXES, MeshConfig, arrange
from deepseek_jax.sharding.presets import FSDP
from deepseek_jax.sharding.rules import check_divisible, logical_axes, shard_count
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.step import make_init, state_specs

STREAM_TRAFFIC = 24
"""Times that one pass of a layer moves its stream between memory and the core, about: norms, what
is projected, residuals, and the float32 between them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rough:
  """A rough plan of a training step, of one device.

  Attributes:
    memory: bytes by class, as in `memory.CLASSES`.
    flops: FLOPs done, recomputed ones included.
    model_flops: FLOPs of the model's own count.
    bytes: moved between memory and the core.
    exchanged: bytes sent, by (mesh axes, what).
    seconds: of 'matrix', 'memory', and exchanges by what.
    step_seconds: estimated.
  """

  memory: dict[str, int]
  flops: float
  model_flops: float
  bytes: float
  exchanged: dict[tuple[str, str], float]
  seconds: dict[str, float]
  step_seconds: float

  @property
  def total_bytes(self) -> int:
    """Memory of all classes together."""
    return sum(self.memory.values())


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Arrays of a run's state without a mesh: shared by all candidates of one model and optimizer.

  Attributes:
    state: abstract `TrainState`.
    axes: logical axis names of `params` and `buffers`.
  """

  state: TrainState
  axes: dict[str, Any]


@functools.lru_cache(maxsize=64)
def shapes_of(experiment: Experiment) -> Shapes:
  """Returns the shapes of a run's state; computes and compiles nothing."""
  decoder = experiment.model.build(
    dtype=jnp.dtype(experiment.precision.compute), remat=experiment.remat
  )
  boxed = jax.eval_shape(lambda key: init_variables(decoder, key), jax.random.key(0))
  axes = logical_axes(boxed)
  schedule = experiment.schedule.build(experiment.train_steps)
  optimizer = experiment.optimizer.build(schedule, axes['params'])
  state = jax.eval_shape(make_init(experiment, decoder, optimizer), jax.random.key(0))
  return Shapes(state, axes)


def _shape_key(experiment: Experiment) -> Experiment:
  """The run without what changes no shape of its state."""
  model, remat = experiment.model, experiment.remat
  if plan_segments(model, remat) == plan_segments(model, None):
    remat = None
  return dataclasses.replace(experiment, mesh=MeshConfig(), rules=FSDP, microbatches=1, remat=remat)


def estimate_roughly(experiment: Experiment, machine: Machine) -> Rough:
  """Estimates a training step without compiling it.

  Args:
    experiment: the run; its mesh is that of the machine.
    machine: what it runs on.

  Raises:
    ConfigError: arrays do not divide among the devices.
  """
  sizes = dict(machine.sizes)
  shapes = shapes_of(_shape_key(experiment))
  specs = state_specs(experiment, shapes.state, shapes.axes)
  errors = check_divisible(shapes.state.params, specs.params, sizes)
  if errors:
    raise ConfigError(errors)
  local = _Local(experiment, sizes)
  memory = _state_bytes(shapes.state, specs, sizes)
  weights = memory['parameters']
  memory['gradients'] = weights * (1 if experiment.microbatches == 1 else 2)
  layer = local.layer_weights(shapes, specs)
  memory['activations'] = round(local.activations())
  memory['temporaries'] = round(local.working_set() + 2 * max(layer.values(), default=0))
  listed = weights_of(
    experiment.model, shapes.state.params, shapes.axes['params'], experiment.segments
  )
  data, devices = experiment.data, math.prod(sizes.values())
  tokens = data.batch_size * data.length / devices
  making = making_flops(experiment.model) * experiment.microbatches
  forward = forward_flops(experiment.model, listed, data.length) * tokens + making
  again = 0.0 if experiment.remat is None else 1.0
  mixing = _mixing(experiment) * tokens
  flops = 3 * forward + 1.5 * mixing + again * (_recomputed(listed) * tokens + mixing + making)
  moved = 3.0 * sum(memory[kind] for kind in ('parameters', 'optimizer', 'gradients'))
  passes = (3 + again) * experiment.microbatches
  moved += passes * sum(layer.values())
  stream = local.stream_bytes() * len(experiment.model.layers())
  moved += STREAM_TRAFFIC * passes * stream
  exchanges = _exchanges(experiment, shapes, specs, local)
  return _time(
    Rough(
      memory=memory, flops=flops, model_flops=3 * forward, bytes=moved,
      exchanged={}, seconds={}, step_seconds=0.0,
    ),
    exchanges,
    machine,
    experiment,
  )  # fmt: skip


def _mixing(experiment: Experiment) -> float:
  """Forward FLOPs a token of what the layers do between tokens and lanes."""
  model, length = experiment.model, experiment.data.length
  return sum(
    block.attention.mixing_flops(length) + 2 * block.residual.mixing_flops(model.width)
    for block in model.layers()
  )


def _recomputed(weights: Sequence[Weight]) -> float:
  """FLOPs a token of the products with layers' weights that the backward pass does again."""
  again = [w for w in weights if w.is_matrix and not w.vectors and w.address.startswith('stack')]
  dense = [w for w in again if w.address.endswith('feed_forward/down') and 'expert' not in w.axes]
  return 2.0 * (
    sum(w.size * w.used * w.products for w in again) - sum(w.size * w.used for w in dense)
  )


def _state_bytes(state: TrainState, specs: TrainState, sizes: Mapping[str, int]) -> dict[str, int]:
  """Bytes of the state on one device."""
  fields = {
    'parameters': (state.params, specs.params),
    'optimizer': (state.opt_state, specs.opt_state),
    'buffers': (state.buffers, specs.buffers),
    'other state': (state.ema, specs.ema),
  }
  return {kind: _tree_bytes(tree, spec, sizes) for kind, (tree, spec) in fields.items()}


def _tree_bytes(tree: Any, specs: Any, sizes: Mapping[str, int]) -> int:
  flat = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
  return sum(
    leaf.size * leaf.dtype.itemsize // math.prod(_pieces(spec, sizes))
    for leaf, spec in zip(jax.tree.leaves(tree), flat, strict=True)
  )


def _pieces(spec: Any, sizes: Mapping[str, int]) -> list[int]:
  return [shard_count(entry, dict(sizes)) for entry in spec]


class _Local:
  """Sizes of activations on one device."""

  def __init__(self, experiment: Experiment, sizes: Mapping[str, int]):
    self.experiment, self.sizes = experiment, dict(sizes)
    self.item = jnp.dtype(experiment.precision.compute).itemsize
    rules, data = experiment.rules, experiment.data
    rows = data.batch_size // experiment.microbatches
    shards = [shard_count(axes, self.sizes) for axes in (rules.batch, rules.seq)]
    self.tokens = math.ceil(rows / shards[0]) * math.ceil(data.length / shards[1])

  def stream_bytes(self) -> float:
    """Bytes of the residual stream [B, T, …] of a microbatch."""
    lanes = max(getattr(block.residual, 'lanes', 1) for block in self.experiment.model.layers())
    return float(self.tokens * self.experiment.model.width * lanes * self.item)

  def activations(self) -> float:
    """Bytes that are remembered for the backward pass."""
    remat, depth = self.experiment.remat, len(self.experiment.model.layers())
    stream = self.stream_bytes()
    if remat is None:
      return depth * (stream * 12 + self.working_set() / 2)
    if isinstance(remat, SquareRoot):
      return stream * (depth / max(math.isqrt(depth), 1) + math.isqrt(depth))
    if isinstance(remat, Compressed):
      return depth * stream / self.item * (1 + 4 / remat.block)
    plain = self.tokens * self.experiment.model.width * self.item
    return depth * (stream + (len(remat.names) * plain if isinstance(remat, Save) else 0))

  def working_set(self) -> float:
    """Bytes of the largest layer's own arrays, and of a chunk of logits."""
    experiment, largest = self.experiment, 0.0
    for block in dict.fromkeys(experiment.model.layers()):
      largest = max(largest, self._attention(block.attention), self._feed_forward(block))
    data, rules = experiment.data, experiment.rules
    rows = max(self.tokens // data.length, 1)
    vocab = experiment.model.vocab / shard_count(rules.act_vocab, self.sizes)
    logits = 4.0 * rows * min(experiment.objective.chunk, data.length) * vocab
    head = 4.0 * experiment.model.width * experiment.model.vocab
    return largest + 2 * logits + head / shard_count(rules.vocab, self.sizes)

  def _attention(self, attention: Any) -> float:
    heads = getattr(attention, 'heads', 1) / shard_count(self.experiment.rules.heads, self.sizes)
    nope, rope = (getattr(attention, name, 0) or 0 for name in ('nope_dim', 'rope_dim'))
    value = getattr(attention, 'value_dim', None) or getattr(attention, 'head_dim', 0) or 0
    key = nope + rope or getattr(attention, 'head_dim', 0) or 0
    # Queries, keys, values and result, each with its gradient.
    return 2.0 * self.tokens * heads * (2 * key + 2 * value) * self.item

  def _feed_forward(self, block: Any) -> float:
    part, width = block.feed_forward, self.experiment.model.width
    hidden = part.hidden / shard_count(self.experiment.rules.mlp, self.sizes)
    if not isinstance(part, MoE):
      return 2.0 * self.tokens * (3 * hidden + width) * self.item
    room = float(self.tokens * part.top_k)
    shards = self.sizes['expert']
    if isinstance(part.dispatch, AllToAll) and shards > 1:
      room = part.dispatch.room(round(room), shards) / part.dispatch.chunks
    hidden = part.hidden / shard_count(self.experiment.rules.expert_mlp, self.sizes)
    return 2.0 * room * (2 * width + 3 * hidden) * self.item

  def layer_weights(self, shapes: Shapes, specs: TrainState) -> dict[str, float]:
    """Bytes of the weights of each stack of layers, gathered for one layer, compute dtype."""
    found: dict[str, float] = {}
    for address, leaf, spec, axes in _flat(shapes, specs):
      if 'layers' not in axes and not address.startswith(('stack', 'mtp')):
        continue
      count = leaf.shape[axes.index('layers')] if 'layers' in axes else 1
      kept = 1
      for name, entry in zip(axes, spec):
        # Whole experts and heads stay where they are; the rest is gathered.
        if name in ('expert', 'heads', 'mlp', 'expert_mlp'):
          kept *= shard_count(entry, self.sizes)
      key = '/'.join(address.split('/')[:3])
      found[key] = found.get(key, 0.0) + leaf.size / count / kept * self.item
    return found


def _flat(shapes: Shapes, specs: TrainState) -> list[tuple[str, Any, Any, tuple[str | None, ...]]]:
  leaves = jax.tree_util.tree_leaves_with_path(shapes.state.params)
  flat = jax.tree.leaves(specs.params, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
  names = jax.tree.leaves(shapes.axes['params'], is_leaf=lambda x: isinstance(x, tuple))
  return [
    (jax.tree_util.keystr(path, simple=True, separator='/'), leaf, spec, axes)
    for (path, leaf), spec, axes in zip(leaves, flat, names, strict=True)
  ]


@dataclasses.dataclass(frozen=True)
class _Exchange:
  what: str
  kind: str
  axes: tuple[str, ...]
  bytes: float


def _exchanges(
  experiment: Experiment, shapes: Shapes, specs: TrainState, local: _Local
) -> list[_Exchange]:
  """Everything that is sent in a step; bytes as of `Collective`."""
  sizes, parts = local.sizes, experiment.microbatches
  passes = 2 if experiment.remat is None else 3
  carriers = [a for a in (*experiment.rules.batch, *experiment.rules.seq) if sizes[a] > 1]
  found: list[_Exchange] = []
  for _, leaf, spec, axes in _flat(shapes, specs):
    cut = [a for entry in spec for a in ((entry,) if isinstance(entry, str) else entry or ())]
    cut = [axis for axis in cut if sizes[axis] > 1]
    # Experts stay where they are; what is cut along axes that carry rows is gathered.
    own = set(experiment.rules.expert) if 'expert' in axes else set()
    gathered = tuple(axis for axis in cut if axis in carriers and axis not in own)
    kept = math.prod(sizes[axis] for axis in cut if axis not in gathered)
    if gathered:
      whole = leaf.size / kept
      found.append(
        _Exchange('weights', 'all-gather', gathered, passes * parts * whole * local.item)
      )
      found.append(_Exchange('gradients', 'reduce-scatter', gathered, parts * whole * 4.0))
    others = tuple(axis for axis in carriers if axis not in cut)
    if others:
      size = leaf.size * 4.0 / math.prod(sizes[axis] for axis in cut)
      found.append(_Exchange('gradients', 'all-reduce', others, parts * size))
  return found + _row_exchanges(experiment, local, passes)


def _row_exchanges(experiment: Experiment, local: _Local, passes: int) -> list[_Exchange]:
  """Rows of experts, and sums over heads and hidden units."""
  sizes, parts, width = local.sizes, experiment.microbatches, experiment.model.width
  found: list[_Exchange] = []
  for block in experiment.model.layers():
    part = block.feed_forward
    if isinstance(part, MoE) and isinstance(part.dispatch, AllToAll) and sizes['expert'] > 1:
      rows = float(local.tokens * part.top_k * width * local.item)
      found.append(_Exchange('rows', 'all-to-all', ('expert',), 2 * passes * parts * rows))
    if sizes['model'] > 1 and 'model' in experiment.rules.heads:
      stream = float(local.tokens * width * local.item)
      found.append(_Exchange('stream', 'all-reduce', ('model',), 2 * passes * parts * stream))
  return found


def _time(
  rough: Rough, exchanges: Sequence[_Exchange], machine: Machine, experiment: Experiment
) -> Rough:
  chip = machine.topology.chip
  dtype = {2: 'bf16', 4: 'f32'}[jnp.dtype(experiment.precision.compute).itemsize]
  seconds = {
    'matrix': rough.flops / chip.rate(dtype),
    'memory': rough.bytes / chip.hbm_bandwidth,
  }
  exchanged: dict[tuple[str, str], float] = {}
  groups: dict[tuple[str, ...], tuple[int, ...]] = {}
  for item in exchanges:
    if item.axes not in groups:
      groups[item.axes] = group_along(item.axes, machine.sizes)
    found = Collective(item.kind, item.axes, groups[item.axes], item.bytes)
    wires = lay_out(found.group, machine.coords, machine.topology)
    spent = collective_seconds(found, wires, machine.topology)
    key = ('·'.join(item.axes), item.what)
    exchanged[key] = exchanged.get(key, 0.0) + found.sent
    seconds[item.what] = seconds.get(item.what, 0.0) + spent
  core = max(seconds['matrix'], seconds['memory'])
  hidden = seconds.get('weights', 0.0) + seconds.get('gradients', 0.0)
  waiting = seconds.get('rows', 0.0) + seconds.get('stream', 0.0)
  step = core + waiting + max(0.0, hidden - core)
  return dataclasses.replace(rough, exchanged=exchanged, seconds=seconds, step_seconds=step)


def group_along(axes: Sequence[str], sizes: Mapping[str, int]) -> tuple[int, ...]:
  """Returns the first group of devices along some axes of a mesh, by their place in it."""
  ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
  index = tuple(slice(None) if name in axes else 0 for name in sizes)
  return tuple(ids[index].reshape(-1).tolist())


def rough_machine(experiment: Experiment, topology: Topology) -> Machine:
  """Returns the machine of a run on a slice, laid out as the run's mesh, without a compiler.

  Raises:
    ConfigError: the axes do not multiply to the number of devices.
  """
  return _machine(experiment.mesh, topology)


@functools.lru_cache(maxsize=256)
def _machine(mesh: MeshConfig, topology: Topology) -> Machine:
  found = mesh.sizes(topology.devices)
  sizes = {axis: found[axis] for axis in MESH_AXES}
  return machine_of(topology, sizes, arrange(places(topology), tuple(sizes.values())).reshape(-1))
