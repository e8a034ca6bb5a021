"""The training step, and everything that is compiled once for a run."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.batch import Batch
from deepseek_jax.models.decoder import Decoder, init_variables
from deepseek_jax.models.plan import Segment
from deepseek_jax.optim.balance import update_buffers
from deepseek_jax.sharding.mesh import make_mesh
from deepseek_jax.sharding.rules import check_divisible, logical_axes, tree_shardings, tree_specs
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.expert_lifecycle import make_lifecycle, split_taps, with_taps
from deepseek_jax.train.guard import fresh_guard, make_settle
from deepseek_jax.train.objective import (
  batch_context,
  batch_totals,
  evaluation_sums,
  training_loss,
)
from deepseek_jax.train.on_mesh import OnMesh
from deepseek_jax.train.placement import count_tokens
from deepseek_jax.train.report import logged_buffers
from deepseek_jax.train.state import TrainState, fresh_state
from deepseek_jax.train.traced import Traced, traced_values, with_traced
from deepseek_jax.train.trainable import check_patterns, trainable_part

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
    """Returns the shapes of a batch [B, T], and of its pictures, with shardings."""
    data = self.experiment.data

    def leaf(dtype, *sizes):
      shape = (data.batch_size, *(sizes or (data.length,)))
      return jax.ShapeDtypeStruct(shape, dtype, sharding=self.batch_sharding)

    ids = leaf(jnp.int32)
    batch = Batch(ids, ids, leaf(jnp.float32), ids, ids, ids)
    if data.image_shape is None:
      return batch
    return dataclasses.replace(batch, images=leaf(jnp.uint8, *data.image_shape), placeholders=ids)


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
  decoder = experiment.model.build(
    dtype=jnp.dtype(experiment.precision.compute),
    remat=experiment.remat,
    stages=experiment.stages,
  )
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
    return fresh_state(
      params,
      buffers,
      optimizer.init(params),
      # A copy: the step is given the memory of both, and one array cannot be given away twice.
      ema=() if experiment.ema is None else jax.tree.map(jnp.copy, params),
      guard=fresh_guard(experiment.guard, experiment.precision),
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
  gradients = make_gradients(experiment, decoder)
  update = make_update(experiment, optimizer)
  settle = make_settle(experiment.guard, experiment.precision)
  advance = make_lifecycle(experiment, axes)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    scale = None if experiment.precision.scaling is None else state.guard.scaling.scale
    (grads, faults), scalars, observed = gradients(state, batch, scale)
    if scale is not None:
      grads = jax.tree.map(lambda grad: grad.astype(jnp.float32) / scale, grads)
    grads = keep_trainable(experiment, grads)
    norm = optax.tree.norm(grads)
    proposed = update(state, grads, observed)
    settled, report = settle(state, proposed, scalars, norm)
    settled, events = advance(state, settled, observed, faults)
    metrics = {
      **scalars,
      'grad_norm': norm,
      'learning_rate': experiment.optimizer.peak_lr * factor(accepted_steps(state)),
      'tokens': jnp.sum(batch.weights),
      'observed': observed,
      'buffers': logged_buffers(settled.buffers),
      **report,
      **events,
    }
    return dataclasses.replace(settled, step=state.step + 1), metrics

  return step


def make_gradients(experiment: Experiment, decoder: Decoder) -> Callable[..., Any]:
  """Returns the function that differentiates the loss of a batch, microbatch by microbatch.

  Returns:
    `(state, batch, scale) -> (gradients, scalars, observed)`, summed over microbatches. The
    gradients are a pair: of the parameters, and of what `split_taps` finds among the buffers.
  """
  depth = 0 if experiment.model.mtp is None else experiment.model.mtp.depth
  mtp_weight = experiment.objective.build(experiment.train_steps)

  def gradients(state: TrainState, batch: Batch, scale: Any) -> tuple[Any, Metrics, Any]:
    totals = batch_totals(batch, depth)
    weight = mtp_weight(state.step)
    noise = jax.random.fold_in(jax.random.key(experiment.seed), state.step)

    def loss(params: Any, taps: Any, part: Batch, key: jax.Array):
      context = batch_context(part, experiment.rules, state.step, key)
      variables = {'params': params, 'buffers': with_taps(state.buffers, taps)}
      chunk = experiment.objective.chunk
      return training_loss(decoder, variables, part, totals, weight, context, chunk, scale)

    differentiate = jax.grad(loss, argnums=(0, 1), has_aux=True)
    taps = split_taps(state.buffers)
    if experiment.microbatches == 1:
      grads, (scalars, observed) = differentiate(state.params, taps, batch, noise)
      return grads, scalars, observed

    def accumulate(sums: Any, given: tuple[Batch, jax.Array]):
      grads, (scalars, observed) = differentiate(state.params, taps, *given)
      return jax.tree.map(jnp.add, sums, (grads, scalars, observed)), None

    parts = (
      split_rows(batch, experiment.microbatches),
      jax.random.split(noise, experiment.microbatches),
    )
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(differentiate, state.params, taps, *first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], *shapes[1]))
    return jax.lax.scan(accumulate, zeros, parts)[0]

  return gradients


def make_update(
  experiment: Experiment, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Any, Any], TrainState]:
  """Returns `(state, gradients, observed) -> state`: what a step proposes; its `step` is as was."""
  balance = experiment.balance
  bias_rate = None if balance is None else balance.build(experiment.train_steps)

  def update(state: TrainState, grads: Any, observed: Any) -> TrainState:
    with jax.named_scope('optimizer'):
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
      # Weight decay moves what has no gradient.
      updates = keep_trainable(experiment, updates)
      params = optax.apply_updates(state.params, updates)
    buffers, ema = state.buffers, state.ema
    if balance is not None and bias_rate is not None:
      buffers = update_buffers(buffers, observed, bias_rate(state.step), balance.direction)
    if experiment.placement is not None:
      buffers = count_tokens(buffers, observed)
    if experiment.ema is not None:
      ema = experiment.ema.update(ema, params, accepted_steps(state))
    return dataclasses.replace(state, params=params, buffers=buffers, opt_state=opt_state, ema=ema)

  return update


def keep_trainable(experiment: Experiment, tree: Any) -> Any:
  """Sets to zero what belongs to frozen weights in a tree like the parameters, [...] each."""
  return trainable_part(experiment.trainable, tree, segments_of(experiment))(tree)


def segments_of(experiment: Experiment) -> tuple[Segment, ...]:
  """Returns the plan of the stack as the run compiles it."""
  return experiment.segments


def accepted_steps(state: TrainState) -> jax.Array:
  """Returns how many updates the weights have seen, [] int32: the optimizer's own count."""
  return state.step - state.guard.skipped if state.guard else state.step


def make_evaluate(experiment: Experiment, decoder: Decoder) -> Callable[..., Metrics]:
  """Returns the pure evaluation of one batch [B, T]: summed nats and targets."""

  def evaluate(params: Any, buffers: Any, batch: Batch) -> Metrics:
    context = batch_context(batch, experiment.rules)
    variables = {'params': params, 'buffers': buffers}
    return evaluation_sums(decoder, variables, batch, context, experiment.objective.chunk)

  return evaluate


def split_rows(batch: Batch, parts: int) -> Batch:
  """Cuts [B, T] into [parts, B / parts, T], every part with rows of every device.

  Neighbouring rows lie on one device: taking every parts-th row moves nothing between devices.
  """
  return jax.tree.map(
    lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1), batch
  )


def state_specs(experiment: Experiment, shapes: TrainState, axes: dict[str, Any]) -> TrainState:
  """Returns the partition spec of every array of the state.

  An array of the optimizer that lies at a parameter's address has the parameter's layout.
  """
  params = tree_specs(experiment.rules, axes['params'])
  buffers = tree_specs(experiment.rules, axes['buffers'])
  table = {
    _names(path): spec
    for path, spec in jax.tree_util.tree_leaves_with_path(
      params, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
  }

  def optimizer_spec(path, leaf):
    names = _names(path)
    for start in range(len(names)):
      spec = table.get(names[start:])
      if spec is not None and len(spec) == leaf.ndim:
        return spec
    return PartitionSpec()

  return TrainState(
    step=PartitionSpec(),  # type: ignore[arg-type]
    params=params,
    buffers=buffers,
    opt_state=jax.tree_util.tree_map_with_path(optimizer_spec, shapes.opt_state),
    ema=params if jax.tree.leaves(shapes.ema) else (),
    guard=jax.tree.map(lambda _: PartitionSpec(), shapes.guard),
    carry=jax.tree.map(lambda _: PartitionSpec(), shapes.carry),
  )


def _names(path: Any) -> tuple[str, ...]:
  return tuple(str(getattr(key, 'key', getattr(key, 'name', key))) for key in path)
