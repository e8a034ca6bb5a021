"""What a step proposes: new weights from a batch, and what follows them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.data.batch import Batch
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.optim.balance import update_buffers
from deepseek_jax.optim.compression import LocalSteps
from deepseek_jax.sharding.rules import tree_specs
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.gradients import (
  Given,
  Own,
  keep_trainable,
  make_gradients,
  make_part_gradients,
  make_shares,
  sum_replicas,
)
from deepseek_jax.train.placement import count_tokens
from deepseek_jax.train.replicas import make_reduction, over_replicas
from deepseek_jax.train.state import TrainState, accepted_steps

Metrics = dict[str, Any]


class Proposal(NamedTuple):
  """What a step would do.

  Attributes:
    state: after it; its `step` is as was.
    scalars: sums over the batch, `loss` among them.
    norm: [] float32, of the gradient.
    observed: by layers.
    faults: gradients of what `split_taps` finds.
    report: what is to be logged beside.
  """

  state: TrainState
  scalars: Metrics
  norm: jax.Array
  observed: Any
  faults: Any
  report: Metrics


Propose = Callable[[TrainState, Batch, jax.Array | None], Proposal]
"""`(state, batch, loss scale) -> proposal`."""


def make_proposal(
  experiment: Experiment, decoder: Decoder, optimizer: optax.GradientTransformation, axes: Any
) -> Propose:
  """Returns the function that says what a step would do.

  Args:
    experiment: the run.
    decoder: the model.
    optimizer: built for the run.
    axes: logical axis names of every parameter.
  """
  make = _make_local if isinstance(experiment.reduction, LocalSteps) else _make_shared
  return make(experiment, decoder, optimizer, axes)


def _make_shared(
  experiment: Experiment, decoder: Decoder, optimizer: optax.GradientTransformation, axes: Any
) -> Propose:
  """One gradient of the whole batch, and one optimizer."""
  kind = experiment.reduction
  assert not isinstance(kind, LocalSteps)
  gradients = make_gradients(experiment, decoder)
  reduce = make_reduction(kind, tree_specs(experiment.rules, axes))
  follow_up = make_follow_up(experiment)

  def propose(state: TrainState, batch: Batch, scale: jax.Array | None) -> Proposal:
    (grads, faults), scalars, observed = gradients(state, batch, scale)
    grads, carry, report = reduce(grads, state.carry)
    norm = optax.tree.norm(grads)
    with jax.named_scope('optimizer'):
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
      # Weight decay moves what has no gradient.
      updates = keep_trainable(experiment, updates)
      params = optax.apply_updates(state.params, updates)
    state = dataclasses.replace(state, opt_state=opt_state, carry=carry)
    return Proposal(follow_up(state, params, observed), scalars, norm, observed, faults, report)

  return propose


def _make_local(
  experiment: Experiment, decoder: Decoder, optimizer: optax.GradientTransformation, axes: Any
) -> Propose:
  """A gradient and an optimizer of each replica; what they have moved is added up when it is due.

  `params` are the weights that replicas last agreed on, `opt_state` is the outer momentum. Of the
  carry, `moved` is how far each replica has gone from there, and `memory` is of its optimizer.
  """
  kind = experiment.reduction
  assert isinstance(kind, LocalSteps)
  replicas = experiment.mesh.replica
  share, part_gradients = make_shares(experiment), make_part_gradients(experiment, decoder)
  reduce = make_reduction(kind.exchange, tree_specs(experiment.rules, axes))
  follow_up = make_follow_up(experiment)

  def one(given: Given, own: tuple[Own, Any, Any]) -> Any:
    rows, moved, memory = own
    weights = jax.tree.map(jnp.add, given.params, moved)
    (grads, faults), scalars, observed = part_gradients(given._replace(params=weights), rows)
    # So that their mean over replicas is the gradient of the whole batch, whose divisors they have.
    grads = jax.tree.map(lambda grad: grad * replicas, grads)
    updates, memory = optimizer.update(grads, memory, weights)
    updates = keep_trainable(experiment, updates)
    moved = jax.tree.map(jnp.add, moved, updates)
    return moved, memory, optax.tree.norm(grads, squared=True), (faults, scalars, observed)

  def meet(params: Any, opt_state: Any, carry: Any) -> Any:
    shares = jax.tree.map(lambda x: x / replicas, carry['moved'])
    mean, kept, report = reduce(shares, carry)
    params, opt_state = kind.update(params, opt_state, mean)
    none = jax.tree.map(jnp.zeros_like, carry['moved'])
    return (
      params,
      opt_state,
      {**carry, 'moved': none, **(kept or {}), 'since': jnp.int32(0)},
      report,
    )

  def propose(state: TrainState, batch: Batch, scale: jax.Array | None) -> Proposal:
    given, rows = share(state, batch, scale)
    own = rows, state.carry['moved'], state.carry['memory']
    moved, memory, squares, found = over_replicas(one)(given, own)
    faults, scalars, observed = sum_replicas(found)
    since = state.carry['since'] + 1
    carry = {**state.carry, 'moved': moved, 'memory': memory, 'since': since}
    # The last step leaves nothing that replicas have not told each other.
    due = (since >= carry['interval']) | (state.step + 1 >= experiment.train_steps)
    shapes = jax.eval_shape(meet, state.params, state.opt_state, carry)
    quiet = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[3])
    params, opt_state, carry, report = jax.lax.cond(
      due, meet, lambda *given: (*given, quiet), state.params, state.opt_state, carry
    )
    report |= {'local_steps': since, 'interval': carry['interval']}
    state = dataclasses.replace(state, opt_state=opt_state, carry=carry)
    norm = jnp.sqrt(jnp.mean(squares))
    return Proposal(follow_up(state, params, observed), scalars, norm, observed, faults, report)

  return propose


def start_optimizer(
  experiment: Experiment, optimizer: optax.GradientTransformation, params: Any
) -> tuple[Any, Any]:
  """Returns `opt_state` and `carry` of a fresh run."""
  kind, replicas = experiment.reduction, experiment.mesh.replica
  if kind is None:
    return optimizer.init(params), ()
  kept = {}
  if kind.feedback is not None:
    kept = {'error': _of_every_replica(jax.tree.map(jnp.zeros_like, params), replicas)}
  if not isinstance(kind, LocalSteps):
    return optimizer.init(params), kept or ()
  return {'momentum': jax.tree.map(jnp.zeros_like, params)}, {
    'moved': _of_every_replica(jax.tree.map(jnp.zeros_like, params), replicas),
    'memory': _of_every_replica(optimizer.init(params), replicas),
    'interval': jnp.int32(kind.interval.start),
    'since': jnp.int32(0),
    **kept,
  }


def _of_every_replica(tree: Any, replicas: int) -> Any:
  return jax.tree.map(lambda x: jnp.repeat(x[None], replicas, axis=0), tree)


def make_follow_up(experiment: Experiment) -> Callable[[TrainState, Any, Any], TrainState]:
  """Returns `(state, params, observed) -> state`: new weights, and what follows them."""
  balance = experiment.balance
  bias_rate = None if balance is None else balance.build(experiment.train_steps)

  def follow_up(state: TrainState, params: Any, observed: Any) -> TrainState:
    buffers, ema = state.buffers, state.ema
    if balance is not None and bias_rate is not None:
      buffers = update_buffers(buffers, observed, bias_rate(state.step), balance.direction)
    if experiment.placement is not None:
      buffers = count_tokens(buffers, observed)
    if experiment.ema is not None:
      ema = experiment.ema.update(ema, params, accepted_steps(state))
    return dataclasses.replace(state, params=params, buffers=buffers, ema=ema)

  return follow_up
