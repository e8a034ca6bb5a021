"""What each unit of a model costs: timed here, or counted."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.tree import bytes_of, flatten
from deepseek_jax.data.batch import Batch
from deepseek_jax.models.cost import Weight, weights_of
from deepseek_jax.models.decoder import canonical, init_variables, plan_segments
from deepseek_jax.models.plan import Block
from deepseek_jax.pods.schedule.plan import Cost
from deepseek_jax.pods.schedule.split import Split, split
from deepseek_jax.pods.schedule.units import Data, Unit, model_units, stream_shape
from deepseek_jax.sharding.rules import logical_axes
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.objective import batch_totals


def init_canonical(experiment: Experiment) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns fresh parameters and buffers of a run, one entry a layer."""
  # The plan without recomputation: how layers are grouped does not matter here.
  decoder = experiment.model.build(dtype=jnp.dtype(experiment.precision.compute))
  variables = nn.meta.unbox(init_variables(decoder, jax.random.key(experiment.seed)))
  segments = plan_segments(experiment.model)
  params, buffers = (canonical(variables[name], segments) for name in ('params', 'buffers'))
  return params, buffers


def random_data(experiment: Experiment, buffers: Any, rows: int) -> Data:
  """Returns a microbatch of random tokens, [rows, T], one document a row."""
  shape = (rows, experiment.data.length)
  tokens = np.random.default_rng(0).integers(0, experiment.model.vocab, shape, np.int32)
  positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
  ones = np.ones(shape, np.int32)
  weights = ones.astype(np.float32)
  arrays = (tokens, np.roll(tokens, -1, axis=1), weights, positions, ones, ones - 1)
  batch = Batch(*jax.tree.map(jnp.asarray, arrays))
  mtp = experiment.model.mtp
  totals = batch_totals(batch, 0 if mtp is None else mtp.depth)
  return Data(batch, buffers, totals.targets, jnp.float32(rows))


def split_units(
  units: Sequence[Unit], params: Any, data: Data, stream: Any, platform: str
) -> dict[Any, Split]:
  """Splits the backward pass of every different unit; arrays [...] may be shapes."""
  found: dict[Any, Split] = {}
  for unit in units:
    if unit.key not in found:
      x = {} if unit is units[0] else stream
      found[unit.key] = split(unit.run, unit.weights(params), x, data, platform)
  return found


def measure_costs(experiment: Experiment, rows: int, repeats: int = 9) -> list[Cost]:
  """Times every unit of a model on this device: median seconds of compiled pieces.

  Units that run equal programs are timed once. Router biases are fresh and tokens are random, so
  that experts are about evenly loaded.

  Args:
    experiment: the run; its precision is not `Fastest`.
    rows: of one microbatch.
    repeats: runs of each piece.

  Raises:
    ConfigError: the model cannot be cut into units.
  """
  units = model_units(experiment)
  params, buffers = jax.jit(lambda: init_canonical(experiment))()
  data = random_data(experiment, buffers, rows)
  first = units[0]
  stream = jax.jit(first.run)(first.weights(params), {}, data)
  parts = split_units(units, params, data, stream, jax.default_backend())
  known: dict[Any, Cost] = {}
  for unit in units:
    if unit.key not in known:
      x = {} if unit is first else stream
      known[unit.key] = time_unit(unit, parts[unit.key], (params, x, data), repeats)
  return [known[unit.key] for unit in units]


def time_unit(unit: Unit, parts: Split, given: tuple[Any, Any, Data], repeats: int) -> Cost:
  """Times the four programs of a unit; they take turns.

  Args:
    unit: what is timed.
    parts: its programs.
    given: canonical parameters, the carry, and the data.
    repeats: runs of each.
  """
  params, x, data = given
  weights = unit.weights(params)
  forward, backward_input, backward_weight, backward = (
    jax.jit(f) for f in (parts.forward, parts.backward_input, parts.backward_weight, parts.backward)
  )
  y, kept = forward(weights, x, data)
  cotangent = jax.tree.map(jnp.ones_like, y)
  _, left = backward_input(weights, data, kept, cotangent)
  calls: dict[str, Callable[[], Any]] = {
    'forward': lambda: forward(weights, x, data),
    'backward_input': lambda: backward_input(weights, data, kept, cotangent),
    'backward_weight': lambda: backward_weight(weights, data, left),
    'backward': lambda: backward(weights, data, kept, cotangent),
  }
  taken: dict[str, list[float]] = {name: [] for name in calls}
  for turn in range(repeats + 1):
    for name, call in calls.items():
      begin = time.perf_counter()
      jax.block_until_ready(call())
      # The first turn compiles.
      if turn:
        taken[name].append(time.perf_counter() - begin)
  return Cost(
    **{name: statistics.median(seconds) for name, seconds in taken.items()},
    kept_bytes=parts.kept_bytes,
    left_bytes=parts.left_bytes,
    parameter_bytes=bytes_of(weights),
  )


def count_costs(experiment: Experiment, rows: int, exchange: float = 0.0) -> list[Cost]:
  """Counts every unit of a model: FLOPs of a microbatch, and bytes that its program remembers.

  A product with weights takes as many FLOPs forward, for the gradient of its input and for that of
  its weights. Attention mixes tokens without weights: twice its forward FLOPs are for the gradient
  of what came in. What `remat` recomputes belongs to the gradient of the input. The head counts
  forward thrice, since the vocabulary loss makes its gradients in the forward pass. Bytes are
  those of the traced program, for one device and without a mesh.

  Args:
    experiment: the run; nothing is run and no array is made.
    rows: of one microbatch.
    exchange: time that a layer's experts wait for their tokens, as a share of the layer's forward
      FLOPs, forward and backward. DeepSeek-V3 reports about 1 across nodes (arXiv 2412.19437,
      section 3.2.1).

  Raises:
    ConfigError: the model cannot be cut into units.
  """
  units = model_units(experiment)
  params, buffers = jax.eval_shape(lambda: init_canonical(experiment))
  data = jax.eval_shape(lambda: random_data(experiment, None, rows))
  data = Data(data.batch, buffers, data.divisors, data.rows)
  stream = stream_shape(experiment, params, data)
  parts = split_units(units, params, data, stream, jax.default_backend())
  tokens = rows * experiment.data.length
  costs = []
  for unit, (products, mixing, experts) in zip(units, _unit_flops(experiment), strict=True):
    products, mixing = products * tokens, mixing * tokens
    forward = products + mixing
    again = forward if experiment.remat is not None and unit.name.startswith('layers/') else 0.0
    into, onto = products + 2 * mixing + again, products
    if unit is units[-1]:
      head = 2.0 * tokens * experiment.model.width * experiment.model.vocab
      head *= 1 + len(_ahead(experiment))
      forward, into, onto = forward + 2 * head, into - head, onto - head
    wait = exchange * (products + mixing) if experts else 0.0
    costs.append(
      Cost(
        forward=forward,
        backward_input=into,
        backward_weight=onto,
        backward=into + onto,
        forward_exchange=wait,
        backward_exchange=wait,
        kept_bytes=parts[unit.key].kept_bytes,
        left_bytes=parts[unit.key].left_bytes,
        parameter_bytes=bytes_of(unit.weights(params)),
      )
    )
  return costs


def _ahead(experiment: Experiment) -> list[Block]:
  """The layer of each MTP depth."""
  model = experiment.model
  return [] if model.mtp is None else [model.mtp.block(model.layers()[-1])] * model.mtp.depth


def _unit_flops(experiment: Experiment) -> list[tuple[float, float, bool]]:
  """Forward FLOPs a token of each unit: products, mixing; and whether it has experts."""
  model = experiment.model
  decoder = model.build(dtype=jnp.float32)
  boxed = jax.eval_shape(lambda key: init_variables(decoder, key), jax.random.key(0))
  axes = logical_axes(boxed)['params']
  weights = weights_of(model, nn.meta.unbox(boxed)['params'], axes)
  assert len(flatten(axes)) == len(weights)
  by_layer: dict[int, float] = {}
  start = 0
  for number, part in enumerate(plan_segments(model)):
    for place in range(len(part.pattern)):
      mine = [w for w in weights if w.address.startswith(f'stack/segment_{number}/block_{place}/')]
      for layer in range(start + place, start + part.layers, len(part.pattern)):
        by_layer[layer] = _products(mine) / part.repeats
    start += part.layers
  layers = [
    (by_layer[number], _mixing(experiment, block), _has_experts(block))
    for number, block in enumerate(model.layers())
  ]
  ahead = _ahead(experiment)
  rest = [w for w in weights if not w.address.startswith('stack/')]
  head = _products(rest) + 2.0 * model.width * model.vocab * len(ahead)
  mixing = sum(_mixing(experiment, block) for block in ahead)
  return [(0.0, 0.0, False), *layers, (head, mixing, any(map(_has_experts, ahead)))]


def _products(weights: Sequence[Weight]) -> float:
  return sum(2.0 * w.size * w.used * w.products for w in weights if w.is_matrix)


def _mixing(experiment: Experiment, block: Block) -> float:
  attention = block.attention.mixing_flops(experiment.data.length)
  return attention + 2 * block.residual.mixing_flops(experiment.model.width)


def _has_experts(block: Block) -> bool:
  return hasattr(block.feed_forward, 'experts')
