"""The plan of a decoding step: one token for every row of a batch, with its cache."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.precision import BFloat16
from deepseek_jax.layers.context import Context
from deepseek_jax.models.cost import forward_flops, weights_of
from deepseek_jax.models.decoder import Decoder, init_variables, plan_segments
from deepseek_jax.models.stack import empty_caches
from deepseek_jax.pods import hlo
from deepseek_jax.pods.estimate import estimate, machine_of
from deepseek_jax.pods.kernels import KernelModel
from deepseek_jax.pods.memory import local_shapes, weights_by_shape
from deepseek_jax.pods.plan import Memory, Plan
from deepseek_jax.pods.topology import Build, Topology, compile_program
from deepseek_jax.pods.training import assemble, facts_of, memory_of, rows_filled
from deepseek_jax.sharding.mesh import make_mesh
from deepseek_jax.sharding.rules import check_divisible, logical_axes, shard_count, tree_specs
from deepseek_jax.train.experiment import Experiment, resolved
from deepseek_jax.train.on_mesh import OnMesh


@dataclasses.dataclass(frozen=True)
class Decoding:
  """A decoding step on a mesh, and the shapes of what it is given.

  Attributes:
    experiment: the run, without multi-token prediction.
    mesh: the devices.
    step: `(variables, caches, tokens [B], positions [B]) -> (logits [B, V], caches)`, jitted; the
      caches' memory is used again.
    arguments: abstract, with shardings.
    axes: logical axis names of the parameters.
  """

  experiment: Experiment
  mesh: Mesh
  step: OnMesh
  arguments: tuple[Any, Any, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]
  axes: Any


def build_decoding(
  experiment: Experiment, devices: Sequence[Any], rows: int, slots: int
) -> Decoding:
  """Builds a decoding step; compiles nothing.

  Weights are kept in the compute dtype and lie as the run's rules say; rows of the batch, and of
  the cache, lie along `rules.batch`.

  Args:
    experiment: the run.
    devices: as many as its mesh has.
    rows: sequences B that are decoded together.
    slots: tokens that the cache has room for.

  Raises:
    ConfigError: rows or weights do not divide among the devices.
  """
  model: Any = experiment.model
  if model.mtp is not None:
    model = dataclasses.replace(model, mtp=None)
  experiment = dataclasses.replace(resolved(experiment, BFloat16()), model=model, remat=None)
  mesh, rules = make_mesh(experiment.mesh, list(devices)), experiment.rules
  dtype = jnp.dtype(experiment.precision.compute)
  decoder = experiment.model.build(dtype=dtype, remat=None)
  boxed = jax.eval_shape(lambda key: init_variables(decoder, key), jax.random.key(0))
  axes = logical_axes(boxed)
  specs = tree_specs(rules, axes)
  shapes = nn.meta.unbox(boxed)
  sizes = {str(axis): size for axis, size in mesh.shape.items()}
  errors = check_divisible(shapes['params'], specs['params'], sizes)
  if rows % shard_count(rules.batch, sizes):
    errors.append(
      f'--decode_rows is {rows}, not divisible by the {shard_count(rules.batch, sizes)} devices '
      f'that share the batch (rules.batch {rules.batch})'
    )
  if errors:
    raise ConfigError(errors)

  def place(leaf, spec):
    kept = dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
    return jax.ShapeDtypeStruct(leaf.shape, kept, sharding=NamedSharding(mesh, spec))

  variables = jax.tree.map(place, shapes, specs)
  caches = _caches(decoder, mesh, rules.batch, rows, slots)
  row = jax.ShapeDtypeStruct(
    (rows,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(rules.batch))
  )
  given = (variables, caches, row, row)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, given)
  logits = NamedSharding(mesh, rules.spec(('batch', 'act_vocab')))
  step = jax.jit(
    _step(decoder, rules),
    in_shardings=shardings,
    out_shardings=(logits, shardings[1]),
    donate_argnums=1,
  )
  return Decoding(experiment, mesh, OnMesh(mesh, step), given, axes['params'])


def _step(decoder: Decoder, rules: Any) -> Any:
  def forward(module: Decoder, context: Context, caches: Any) -> tuple[jax.Array, Any]:
    hidden, caches = module(context, caches)
    return module.logits(hidden, context)[:, 0], caches

  def decode_step(
    variables: Any, caches: Any, tokens: jax.Array, positions: jax.Array
  ) -> tuple[jax.Array, Any]:
    context = Context(
      tokens=tokens[:, None],
      positions=positions[:, None],
      segments=jnp.ones_like(tokens)[:, None],
      rules=rules,
    )
    found: Any = decoder.apply(variables, context, caches, method=forward)
    return found

  return decode_step


def _caches(decoder: Decoder, mesh: Mesh, axes: tuple[str, ...], rows: int, slots: int) -> Any:
  """Abstract caches whose rows lie along some axes of the mesh."""
  segments = plan_segments(decoder.config, None)
  shapes = jax.eval_shape(lambda: empty_caches(segments, rows, slots, decoder.dtype))

  def place(leaf, scanned):
    spec = PartitionSpec(*([None] if scanned else []), axes)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

  return tuple(
    jax.tree.map(lambda leaf, scanned=part.repeats > 1: place(leaf, scanned), cache)
    for part, cache in zip(segments, shapes, strict=True)
  )


def plan_decoding(
  experiment: Experiment,
  topology: Topology,
  devices: Sequence[Any],
  rows: int,
  slots: int,
  command: str = '',
) -> Plan:
  """Compiles a decoding step for a slice, and says what one of its devices holds and does.

  Args:
    experiment: the run.
    topology: the slice.
    devices: of the slice.
    rows: sequences that are decoded together.
    slots: tokens that the cache has room for; all are taken for full.
    command: that repeats the plan.
  """
  decoding = build_decoding(experiment, devices, rows, slots)
  build = compile_program(lambda: decoding.step.lower(*decoding.arguments), for_tpu=True)
  return read_decoding(decoding, topology, build, slots, command)


def read_decoding(
  decoding: Decoding, topology: Topology, build: Build, slots: int, command: str = ''
) -> Plan:
  """Makes the plan of a decoding step that is compiled.

  Args:
    decoding: the step.
    topology: the slice.
    build: what the compiler made.
    slots: tokens of the cache.
    command: that repeats the plan.
  """
  experiment, chip = decoding.experiment, topology.chip
  variables, caches, tokens, _ = decoding.arguments
  module = hlo.parse(build.text)
  machine = machine_of(topology, dict(decoding.mesh.shape), decoding.mesh.devices.reshape(-1))
  kernels = KernelModel(rows_filled=rows_filled(experiment, dict(machine.sizes)))
  tally = estimate(module, machine, kernels)
  counted = {
    'parameters': sum(size for _, size in local_shapes(variables['params']).values()),
    'buffers': sum(size for _, size in local_shapes(variables['buffers']).values()),
    'cache': sum(size for _, size in local_shapes(caches).values()),
  }
  weights = weights_of(experiment.model, variables['params'], decoding.axes)
  flops = forward_flops(experiment.model, weights, slots) * tokens.shape[0]
  found = memory_of(module, build, weights_by_shape(variables['params']), counted)
  return assemble(
    tally,
    Memory(**found, usable_bytes=int(chip.hbm_bytes)),
    chip,
    estimate(module, machine, kernels, cycles=True).total_seconds,
    name=experiment.name,
    kind='decode',
    command=command,
    topology=topology.name,
    mesh=dict(machine.sizes),
    tokens=tokens.shape[0],
    model_flops=flops / len(machine.coords),
    facts=facts_of(build, tally) | {'slots of the cache, all full': slots},
  )
