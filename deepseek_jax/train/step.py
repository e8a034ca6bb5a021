"""The training step, and everything that is compiled once for a run."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.batch import Batch, Media
from deepseek_jax.models.decoder import Decoder, init_variables
from deepseek_jax.sharding.host_rows import own_rows, put_rows
from deepseek_jax.sharding.mesh import make_mesh
from deepseek_jax.sharding.rules import check_divisible, logical_axes, tree_shardings
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.expert_lifecycle import make_lifecycle
from deepseek_jax.train.gradients import segments_of
from deepseek_jax.train.guard import fresh_guard, make_settle
from deepseek_jax.train.layout import state_specs
from deepseek_jax.train.objective import (
  batch_context,
  evaluation_sums,
)
from deepseek_jax.train.on_mesh import OnMesh
from deepseek_jax.train.report import logged_buffers
from deepseek_jax.train.state import TrainState, accepted_steps, fresh_state
from deepseek_jax.train.traced import Traced, traced_values, with_traced
from deepseek_jax.train.trainable import check_patterns
from deepseek_jax.train.update import make_proposal, start_optimizer

Metrics = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Program:
  """Pure functions of a run, and how their arrays lie on the mesh.

  Attributes:
    experiment: what the functions were made from.
    decoder: the model.
    mesh: the devices.
    init: `key -> TrainState`, jitted, each array made where it stays.
    step: `(state, batch) -> (state, metrics)`, jitted; the state is donated.
    evaluate: `(params, buffers, batch) -> sums`, jitted.
    abstract_state: shapes, dtypes and shardings of the state.
    batch_sharding: of each [B, T] array of a batch.
    axes: logical axis names of every parameter.
  """

  experiment: Experiment
  decoder: Decoder
  mesh: Mesh
  init: OnMesh
  step: OnMesh
  evaluate: OnMesh
  abstract_state: TrainState
  batch_sharding: NamedSharding
  axes: Any

  def abstract_batch(self) -> Batch:
    """Returns the shapes of a batch [B, T], and of its media, with shardings."""
    data = self.experiment.data

    def leaf(dtype, *sizes):
      shape = (data.batch_size, *(sizes or (data.length,)))
      return jax.ShapeDtypeStruct(shape, dtype, sharding=self.batch_sharding)

    ids = leaf(jnp.int32)
    batch = Batch(ids, ids, leaf(jnp.float32), ids, ids, ids)
    if not data.media:
      return batch
    media = {
      kind: Media(leaf(jnp.dtype(shape.dtype), *shape.values), leaf(jnp.int32, shape.values[0]))
      for kind, shape in data.media.items()
    }
    return dataclasses.replace(batch, media=media, placeholders=ids)

  @functools.cached_property
  def own_rows(self) -> np.ndarray | None:
    """Which rows of a batch this host reads; None reads all."""
    data = self.experiment.data
    return own_rows(self.batch_sharding, (data.batch_size, data.length))

  def put(self, batch: Batch) -> Batch:
    """Puts the rows that this host has read of a batch onto the mesh."""
    return put_rows(batch, self.batch_sharding, self.experiment.data.batch_size, self.own_rows)


def build_program(experiment: Experiment, devices: list[jax.Device] | None = None) -> Program:
  """Builds the functions of a run; compiles nothing and makes no array.

  Raises:
    ConfigError: the parts do not fit together or onto the mesh; every fault is listed.
  """
  devices = jax.devices() if devices is None else devices
  errors = experiment.check(len(devices))
  if errors:
    raise ConfigError(errors)
  mesh = make_mesh(experiment.mesh, devices)
  dtype = jnp.dtype(experiment.precision.compute)
  decoder = experiment.model.build(dtype, experiment.remat, experiment.stages)
  boxed = jax.eval_shape(lambda key: init_variables(decoder, key), jax.random.key(0))
  axes = logical_axes(boxed)
  schedule = experiment.schedule.build(experiment.train_steps)
  optimizer = experiment.optimizer.build(schedule, axes['params'])

  init = make_init(experiment, decoder, optimizer)
  shapes = jax.eval_shape(init, jax.random.key(0))
  specs = state_specs(experiment, shapes, axes)
  sizes = {str(axis): size for axis, size in mesh.shape.items()}
  # The optimizer's arrays repeat the parameters' faults: they are looked at when those have none.
  errors = check_divisible(shapes.params, specs.params, sizes)
  errors = errors or check_divisible(shapes, specs, sizes)
  errors = errors or check_patterns(experiment.trainable, shapes.params, segments_of(experiment))
  if errors:
    raise ConfigError(errors)
  shardings = tree_shardings(mesh, specs)
  batch_sharding = NamedSharding(mesh, experiment.rules.spec(('batch', 'seq')))
  replicated = NamedSharding(mesh, PartitionSpec())

  def step(state: TrainState, batch: Batch, values: Traced) -> tuple[TrainState, Metrics]:
    run = with_traced(experiment, values)
    optimizer = run.optimizer.build(schedule, axes['params'])
    return make_step(run, decoder, optimizer, axes['params'])(state, batch)

  evaluate = make_evaluate(experiment, decoder)
  return Program(
    experiment=experiment,
    decoder=decoder,
    mesh=mesh,
    init=OnMesh(
      mesh, jax.jit(init, out_shardings=shardings, compiler_options=init_options(devices[0]))
    ),
    step=OnMesh(
      mesh,
      jax.jit(
        step,
        in_shardings=(shardings, batch_sharding, replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
      ),
      constants=(traced_values(experiment),),
    ),
    evaluate=OnMesh(mesh, jax.jit(evaluate, out_shardings=replicated)),
    abstract_state=jax.tree.map(
      lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
      shapes,
      shardings,
    ),
    batch_sharding=batch_sharding,
    axes=axes['params'],
  )


def init_options(device: jax.Device) -> dict[str, Any] | None:
  """Returns the compiler options of `init`, or None for the compiler's own.

  On CPU every random array is a loop of its own, each of which LLVM takes a second to polish for
  the one time that it runs; with less polish, `init` compiles twice as fast.
  """
  return {'xla_backend_optimization_level': 1} if device.platform == 'cpu' else None


def make_init(
  experiment: Experiment, decoder: Decoder, optimizer: optax.GradientTransformation
) -> Callable[[jax.Array], TrainState]:
  """Returns the pure function `key -> TrainState`, not yet jitted."""

  def init(key: jax.Array) -> TrainState:
    variables = nn.meta.unbox(init_variables(decoder, key))
    params, buffers = variables['params'], variables['buffers']
    opt_state, carry = start_optimizer(experiment, optimizer, params)
    return fresh_state(
      params,
      buffers,
      opt_state,
      # A copy: the step is given the memory of both, and one array cannot be given away twice.
      ema=() if experiment.ema is None else jax.tree.map(jnp.copy, params),
      guard=fresh_guard(experiment.guard, experiment.precision),
      carry=carry,
    )

  return init


def make_step(
  experiment: Experiment, decoder: Decoder, optimizer: optax.GradientTransformation, axes: Any
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Returns the pure training step, not yet jitted; `experiment` may hold tracers: see `traced`.

  Args:
    experiment: the run.
    decoder: the model.
    optimizer: built for the run.
    axes: logical axis names of every parameter.
  """
  factor = experiment.schedule.build(experiment.train_steps)
  propose = make_proposal(experiment, decoder, optimizer, axes)
  settle = make_settle(experiment.guard, experiment.precision)
  advance = make_lifecycle(experiment, axes)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    scale = None if experiment.precision.scaling is None else state.guard.scaling.scale
    found = propose(state, batch, scale)
    settled, report = settle(state, found.state, found.scalars, found.norm)
    settled, events = advance(state, settled, found.observed, found.faults)
    metrics = {
      **found.scalars,
      'grad_norm': found.norm,
      'learning_rate': experiment.optimizer.peak_lr * factor(accepted_steps(state)),
      'tokens': jnp.sum(batch.weights),
      'observed': found.observed,
      'buffers': logged_buffers(settled.buffers),
      **found.report,
      **report,
      **events,
    }
    return dataclasses.replace(settled, step=state.step + 1), metrics

  return step


def make_evaluate(experiment: Experiment, decoder: Decoder) -> Callable[..., Metrics]:
  """Returns the pure evaluation of one batch [B, T]: summed nats and targets."""

  def evaluate(params: Any, buffers: Any, batch: Batch) -> Metrics:
    parallel = experiment.context_parallel
    context = batch_context(batch, experiment.rules, parallel=parallel)
    variables = {'params': params, 'buffers': buffers}
    return evaluation_sums(decoder, variables, batch, context, experiment.objective.chunk)

  return evaluate
