"""The gradient of a batch: by microbatches, and by replicas where each has one of its own."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.data.batch import Batch
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.plan import Segment
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.expert_lifecycle import split_taps, with_taps
from deepseek_jax.train.objective import Totals, batch_context, batch_totals, training_loss
from deepseek_jax.train.replicas import AXIS, over_replicas, split_replicas
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.trainable import trainable_part

Metrics = dict[str, Any]


class Given(NamedTuple):
  """What all rows of a batch share.

  Attributes:
    params: of the state.
    buffers: of the state.
    step: [] int32.
    targets: [1 + depth] float32, divisors of the whole batch.
    weight: [] float32, weight λ of MTP.
    scale: [] float32 loss scale, or None.
  """

  params: Any
  buffers: Any
  step: jax.Array
  targets: jax.Array
  weight: jax.Array
  scale: jax.Array | None


class Own(NamedTuple):
  """What one replica has: its rows [B, T], and the key of its noise."""

  batch: Batch
  noise: jax.Array


def make_shares(experiment: Experiment) -> Callable[..., tuple[Given, Own]]:
  """Returns `(state, batch, scale) -> (given, own)`, whose divisors are those of the whole batch.

  Where a kind adds up what replicas have, arrays of `own` are [R, ...].
  """
  depth = 0 if experiment.model.mtp is None else experiment.model.mtp.depth
  mtp_weight = experiment.objective.build(experiment.train_steps)

  def share(state: TrainState, batch: Batch, scale: jax.Array | None) -> tuple[Given, Own]:
    totals = batch_totals(batch, depth)
    noise = jax.random.fold_in(jax.random.key(experiment.seed), state.step)
    weight = mtp_weight(state.step)
    given = Given(state.params, state.buffers, state.step, totals.targets, weight, scale)
    if experiment.reduction is None:
      return given, Own(batch, noise)
    replicas = experiment.mesh.replica
    return given, Own(split_replicas(batch, replicas), jax.random.split(noise, replicas))

  return share


def make_part_gradients(
  experiment: Experiment, decoder: Decoder
) -> Callable[[Given, Own], tuple[Any, Metrics, Any]]:
  """Returns the function that differentiates the loss of a part of a batch.

  Returns:
    `(given, own) -> (gradients, scalars, observed)`, summed over microbatches; they add up over
    parts. The gradients are a pair: of the parameters, and of what `split_taps` finds among the
    buffers. A loss scale is taken out of those of the parameters.
  """
  apart = experiment.reduction is not None
  rules = experiment.rules.without(AXIS) if apart else experiment.rules
  rows, chunk = experiment.data.batch_size, experiment.objective.chunk

  def loss(given: Given, taps: Any, params: Any, own: Own):
    context = batch_context(own.batch, rules, given.step, own.noise, experiment.context_parallel)
    variables = {'params': params, 'buffers': with_taps(given.buffers, taps)}
    totals = Totals(given.targets, rows)
    return training_loss(
      decoder, variables, own.batch, totals, given.weight, context, chunk, given.scale
    )

  def part_gradients(given: Given, own: Own) -> tuple[Any, Metrics, Any]:
    found = _accumulate(functools.partial(loss, given), given, own, experiment.microbatches)
    (taps, grads), scalars, observed = found
    if given.scale is not None:
      scale = given.scale
      grads = jax.tree.map(lambda grad: grad.astype(jnp.float32) / scale, grads)
    return (keep_trainable(experiment, grads), taps), scalars, observed

  return part_gradients


def make_gradients(experiment: Experiment, decoder: Decoder) -> Callable[..., Any]:
  """Returns the function that differentiates the loss of a batch.

  Returns:
    `(state, batch, scale) -> (gradients, scalars, observed)` as of `make_part_gradients`, of the
    whole batch; but where a kind adds up what replicas have, gradients of parameters are [R, ...].
  """
  share, part_gradients = make_shares(experiment), make_part_gradients(experiment, decoder)

  def gradients(state: TrainState, batch: Batch, scale: Any) -> tuple[Any, Metrics, Any]:
    given, own = share(state, batch, scale)
    if experiment.reduction is None:
      return part_gradients(given, own)
    (grads, taps), *rest = over_replicas(part_gradients)(given, own)
    taps, scalars, observed = sum_replicas((taps, *rest))
    return (grads, taps), scalars, observed

  return gradients


def sum_replicas(tree: Any) -> Any:
  """Adds up arrays [R, ...] over replicas: counts and scalars, which cross as they are."""
  return jax.tree.map(lambda x: jnp.sum(x, axis=0), tree)


def _accumulate(
  loss: Callable[..., Any], given: Given, own: Own, microbatches: int
) -> tuple[Any, Metrics, Any]:
  """Differentiates a loss `(taps, params, own)` of every microbatch, and sums."""
  differentiate = jax.grad(loss, argnums=(0, 1), has_aux=True)
  taps = split_taps(given.buffers)
  if microbatches == 1:
    grads, (scalars, observed) = differentiate(taps, given.params, own)
    return grads, scalars, observed

  def add(sums: Any, part: Own):
    grads, (scalars, observed) = differentiate(taps, given.params, part)
    return jax.tree.map(jnp.add, sums, (grads, scalars, observed)), None

  parts = Own(split_rows(own.batch, microbatches), jax.random.split(own.noise, microbatches))
  first = jax.tree.map(lambda x: x[0], parts)
  shapes = jax.eval_shape(differentiate, taps, given.params, first)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], *shapes[1]))
  return jax.lax.scan(add, zeros, parts)[0]


def keep_trainable(experiment: Experiment, tree: Any) -> Any:
  """Sets to zero what belongs to frozen weights in a tree like the parameters, [...] each."""
  return trainable_part(experiment.trainable, tree, segments_of(experiment))(tree)


def segments_of(experiment: Experiment) -> tuple[Segment, ...]:
  """Returns the plan of the stack as the run compiles it."""
  return experiment.segments


def split_rows(batch: Batch, parts: int) -> Batch:
  """Cuts [B, T] into [parts, B / parts, T], every part with rows of every device.

  Neighbouring rows lie on one device: taking every parts-th row moves nothing between devices.
  """
  return jax.tree.map(
    lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1), batch
  )
