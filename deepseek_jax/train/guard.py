"""Steps that would do harm are skipped: what is not finite, and what leaps out of its past.

The decision is made inside the compiled step from sums over the whole batch, so that microbatches
and devices cannot disagree, and costs no word with the host. A skipped step leaves the weights, the
optimizer, the routers' biases and the averaged weights as they were.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.loss_scale import ScaleState, start_scale
from deepseek_jax.core.precision import Precision
from deepseek_jax.optim.check import check_fields
from deepseek_jax.train.state import TrainState

KINDS = ('', 'nonfinite_loss', 'nonfinite_gradient', 'spike', 'overflow')
"""Names of faults by their number; 0 is none."""
NONFINITE_LOSS, NONFINITE_GRADIENT, SPIKE, OVERFLOW = range(1, 5)


def _check_rule(rule: 'Deviations | Multiple') -> None:
  check_fields(
    rule,
    {
      'decay': (0 <= rule.decay < 1, 'a share in [0, 1)'),
      'warmup_steps': (rule.warmup_steps >= 1, 'a count of at least 1'),
      'patience': (rule.patience >= 1, 'a count of at least 1'),
    },
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deviations:
  """A spike is a loss or gradient norm far above its running mean, in standard deviations.

  Attributes:
    limit: standard deviations above the mean that are still taken.
    floor: the standard deviation counts as at least this share of the mean, so that a very even
      run does not trip over a small step.
    decay: how much of the running mean and variance is kept each accepted step.
    warmup_steps: accepted steps before anything can be a spike.
    patience: spikes in a row that are skipped. The next is taken for the new level: its step is
      accepted and the statistics begin anew, so that a lasting change cannot stop all learning.
      At `Guard.stop_after` or more, the run stops before that.
  """

  limit: float = 10.0
  floor: float = 0.05
  decay: float = 0.98
  warmup_steps: int = 100
  patience: int = 5

  def __post_init__(self):
    _check_rule(self)
    check_fields(
      self,
      {
        'limit': (self.limit > 0, 'a number above 0'),
        'floor': (self.floor >= 0, 'a share of at least 0'),
      },
    )

  def bounds(self, mean: jax.Array, variance: jax.Array) -> jax.Array:
    """Returns the largest loss and gradient norm [2] that are no spike, of their statistics [2]."""
    return mean + self.limit * jnp.maximum(jnp.sqrt(variance), self.floor * mean)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiple:
  """A spike is a loss or gradient norm that is a multiple of its running mean.

  Attributes:
    loss: multiple of the mean loss that is still taken.
    gradient: multiple of the mean gradient norm that is still taken.
    decay: as in `Deviations`.
    warmup_steps: as in `Deviations`.
    patience: as in `Deviations`.
  """

  loss: float = 2.0
  gradient: float = 10.0
  decay: float = 0.98
  warmup_steps: int = 100
  patience: int = 5

  def __post_init__(self):
    _check_rule(self)
    above = 'a number above 1'
    check_fields(self, {'loss': (self.loss > 1, above), 'gradient': (self.gradient > 1, above)})

  def bounds(self, mean: jax.Array, variance: jax.Array) -> jax.Array:
    """Returns the largest loss and gradient norm [2] that are no spike, of their statistics [2]."""
    return mean * jnp.float32([self.loss, self.gradient])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
  """Skips steps whose loss or gradient is not finite or spikes; stops a run that only skips.

  Attributes:
    spike: what counts as a spike, or None to skip only what is not finite.
    stop_after: skipped steps in a row after which the run stops. An overflow that lowered the loss
      scale does not count: the rule is at work.
  """

  spike: Deviations | Multiple | None = Deviations()
  stop_after: int = 20

  def __post_init__(self):
    if self.stop_after < 1:
      raise ConfigError(f'`stop_after` is {self.stop_after}; expected 1 or more')


@struct.dataclass
class GuardState:
  """What the guard remembers; the same scalars whatever its kind.

  Attributes:
    skipped: [] int32, skipped steps so far.
    in_a_row: [] int32, those since the last accepted step that count towards a stop.
    spikes: [] int32, spikes since the last accepted step.
    seen: [] int32, accepted steps in the statistics.
    mean: [2] float32, running means of loss and gradient norm.
    variance: [2] float32, their running variances.
    scaling: of the loss scale.
  """

  skipped: jax.Array
  in_a_row: jax.Array
  spikes: jax.Array
  seen: jax.Array
  mean: jax.Array
  variance: jax.Array
  scaling: ScaleState


def fresh_guard(guard: Guard | None, precision: Precision) -> GuardState | tuple[()]:
  """Returns the guard's part of the state before the first step; empty where nothing guards."""
  if guard is None and precision.scaling is None:
    return ()
  none, pair = jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.float32)
  scaling = start_scale(1.0) if precision.scaling is None else precision.scaling.start()
  return GuardState(none, none, none, none, pair, pair, scaling)


def make_settle(
  guard: Guard | None, precision: Precision
) -> Callable[[TrainState, TrainState, dict[str, jax.Array], jax.Array], Any]:
  """Returns the function that accepts or skips a step.

  Returns:
    `settle(state, proposed, losses, norm) -> (state, report)`: the state before the step or the
    proposed one, with the new guard; and what the loop reads. `losses` are the scalars that the
    objective summed, `loss` among them; `norm` is the [] float32 gradient norm.
  """
  if guard is None and precision.scaling is None:
    return lambda state, proposed, losses, norm: (proposed, {})
  rule = None if guard is None else guard.spike

  def settle(
    state: TrainState, proposed: TrainState, losses: dict[str, jax.Array], norm: jax.Array
  ) -> tuple[TrainState, dict[str, Any]]:
    before: GuardState = state.guard
    finite = jnp.isfinite(sum(losses.values()))
    broken = finite & ~jnp.isfinite(norm)
    values = jnp.stack([losses['loss'], norm])
    bounds = jnp.full(2, jnp.inf) if rule is None else _bounds(rule, before)
    over = finite & ~broken & jnp.any(values > bounds)
    persists = over & (before.spikes >= (rule.patience if rule else 0))
    fault = jnp.where(
      ~finite,
      NONFINITE_LOSS,
      jnp.where(
        broken,
        NONFINITE_GRADIENT if precision.scaling is None else OVERFLOW,
        jnp.where(over & ~persists, SPIKE, 0),
      ),
    )
    accepted = fault == 0
    after = _count(before, fault, persists, values, 0.0 if rule is None else rule.decay)
    if precision.scaling is not None:
      after = _rescale(precision, before, after, finite, broken, norm)
    kept = jax.tree.map(
      lambda new, old: jnp.where(accepted, new, old),
      dataclasses.replace(proposed, guard=()),
      dataclasses.replace(state, guard=()),
    )
    report = {
      'skipped_steps': after.skipped,
      'guard': {'fault': fault, 'in_a_row': after.in_a_row, 'bounds': bounds},
    }
    if precision.scaling is not None:
      report['loss_scale'] = before.scaling.scale
    return dataclasses.replace(kept, guard=after), report

  return settle


def _bounds(rule: Deviations | Multiple, state: GuardState) -> jax.Array:
  """The largest loss and gradient norm [2] that are no spike; infinite in the warm-up."""
  return jnp.where(
    state.seen >= rule.warmup_steps, rule.bounds(state.mean, state.variance), jnp.inf
  )


def _count(
  state: GuardState, fault: jax.Array, persists: jax.Array, values: jax.Array, decay: float
) -> GuardState:
  """Counts a step, and takes loss and norm [2] of an accepted one into the statistics."""
  accepted = fault == 0
  seen = jnp.where(persists, 0, state.seen)
  # A plain mean of the first steps, a running one after them; the first step of new statistics
  # overwrites the old. The scalars of a skipped step may be NaN: they must not be multiplied.
  share = jnp.maximum(1 - decay, 1 / (seen + 1).astype(jnp.float32))
  away = jnp.where(accepted, values - state.mean, 0)
  mean = state.mean + share * away
  variance = (1 - share) * (state.variance + share * away**2)
  return dataclasses.replace(
    state,
    skipped=state.skipped + ~accepted,
    in_a_row=jnp.where(accepted, 0, state.in_a_row + 1),
    spikes=jnp.where(accepted, 0, state.spikes + (fault == SPIKE)),
    seen=jnp.where(accepted, seen + 1, seen),
    mean=mean,
    variance=jnp.where(accepted, variance, state.variance),
  )


def _rescale(
  precision: Precision,
  before: GuardState,
  after: GuardState,
  finite: jax.Array,
  overflow: jax.Array,
  norm: jax.Array,
) -> GuardState:
  """Moves the loss scale. A loss that is not finite says nothing about it."""
  assert precision.scaling is not None
  moved = precision.scaling.update(before.scaling, overflow, norm)
  scaling = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, before.scaling)
  lowered = overflow & (scaling.scale < before.scaling.scale)
  in_a_row = jnp.where(lowered, before.in_a_row, after.in_a_row)
  return dataclasses.replace(after, scaling=scaling, in_a_row=in_a_row)
