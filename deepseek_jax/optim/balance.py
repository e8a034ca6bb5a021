"""Keeping a mixture of experts balanced by moving a bias, not by a loss.

Each expert has a bias that is added to its score when experts are chosen, and only then. After a
step, the bias of every expert with less than the mean load goes up and that of every expert with
more goes down: by a fixed rate, or by as much as the load is off. No gradient is involved: the bias
is a buffer, not a parameter. Routers without one are left alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.optim.check import check_fields
from deepseek_jax.optim.schedule import Constant, Schedule, ScheduleFn

BIAS = 'selection_bias'
LOAD = 'load'
ALLOWED = 'allowed'


@dataclasses.dataclass(frozen=True, kw_only=True)
class _BiasRule:
  """A rate and its schedule; kinds say which way a bias moves."""

  rate: float = 1e-3
  schedule: Schedule = Constant()

  traced = ('rate',)

  def __post_init__(self):
    """Validates the fields.

    Raises:
      ConfigError: the rate is negative.
    """
    check_fields(self, {'rate': (self.rate >= 0, 'a number of at least 0')})

  def build(self, total_steps: int) -> ScheduleFn:
    """Returns the rate (float32 scalar) as a function of the step.

    Args:
      total_steps: updates in the whole run.

    Raises:
      ConfigError: the schedule does not fit into the run.
    """
    factor = self.schedule.build(total_steps)
    return lambda step: self.rate * factor(step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SignBias(_BiasRule):
  """Moves each expert's selection bias by a fixed rate towards balance, each step.

  Attributes:
    rate: how far a bias moves in one step where the schedule's factor is 1.
    schedule: factor of the rate by step. DeepSeek-V3 stops for the last 500B of its 14.8T tokens:
      `MultiStep(warmup_steps=0, boundaries=(0.966,), factor=0.0)`.

  Source: DeepSeek-V3 (arXiv 2412.19437) section 2.1.2; Wang et al. (arXiv 2408.15664),
    algorithm 1.
  """

  def direction(self, load: jax.Array, allowed: jax.Array | None = None) -> jax.Array:
    """Returns +1, 0 or −1 for loads [..., E] below, at or above the mean."""
    return sign_of_shortfall(load, allowed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProportionalBias(_BiasRule):
  """Moves each expert's selection bias towards balance by as much as its load is off, each step.

  The paper moves by the error in tokens; here it is a share of the mean load, so that the rate does
  not depend on the size of the batch. An expert that nobody chose moves by the whole rate.

  Attributes:
    rate: how far a bias moves in one step for a load that is off by the mean, where the schedule's
      factor is 1.
    schedule: factor of the rate by step.

  Source: Wang et al. (arXiv 2408.15664), its study of update rules.
  """

  def direction(self, load: jax.Array, allowed: jax.Array | None = None) -> jax.Array:
    """Returns how much of the mean each load [..., E] lacks."""
    return shortfall(load, allowed)


def sign_of_shortfall(load: jax.Array, allowed: jax.Array | None = None) -> jax.Array:
  """Returns the sign [..., E] of mean − load, of loads [..., E] float32; see `shortfall`."""
  # Without the division, whose rounding could move a perfectly even load.
  return jnp.sign(_missing(load, allowed))


def shortfall(load: jax.Array, allowed: jax.Array | None = None) -> jax.Array:
  """Returns (mean − load) / mean, [..., E], of loads [..., E] float32; 0 where all are 0.

  Args:
    load: tokens that chose each expert.
    allowed: 0 for experts that could not be chosen, [..., E]: they lack nothing, and the mean is
      that of the others. None where all could.
  """
  return _missing(load, allowed) / jnp.maximum(load.sum(axis=-1, keepdims=True), 1.0)


def _missing(load: jax.Array, allowed: jax.Array | None) -> jax.Array:
  """The mean less the load, times the number of experts that could be chosen."""
  total = load.sum(axis=-1, keepdims=True)
  if allowed is None:
    return total - load.shape[-1] * load
  able = (allowed > 0).astype(jnp.float32)
  return able * (total - able.sum(axis=-1, keepdims=True) * load)


Direction = Callable[[jax.Array, jax.Array | None], jax.Array]
"""Which way, and how far as a multiple of the rate, biases move by loads [..., E], and by
which experts could be chosen."""


def update_bias(
  bias: jax.Array,
  load: jax.Array,
  rate: jax.typing.ArrayLike,
  direction: Direction = sign_of_shortfall,
  allowed: jax.Array | None = None,
) -> jax.Array:
  """Raises the bias of experts with too little load and lowers it for those with too much.

  Args:
    bias: float [..., E].
    load: tokens that chose each expert, summed over the whole batch, [..., E].
    rate: how far a bias moves; scalar.
    direction: of the balance kind.
    allowed: 0 for experts that could not be chosen, [..., E]: their bias stays. None where all
      could.

  Returns:
    The new bias [..., E], in the dtype of `bias`.

  Source: DeepSeek-V3 (arXiv 2412.19437) section 2.1.2.
  """
  change = rate * direction(load.astype(jnp.float32), allowed)
  return bias + change.astype(bias.dtype)


def update_buffers(
  buffers: Mapping[str, Any],
  observed: Mapping[str, Any],
  rate: jax.typing.ArrayLike,
  direction: Direction = sign_of_shortfall,
) -> dict[str, Any]:
  """Applies `update_bias` to every selection bias in a model's buffers.

  Args:
    buffers: nested dict; arrays named 'selection_bias' have shape [..., E].
    observed: nested dict that has an array 'load' [..., E] beside each of them, and 'allowed' where
      not every expert could be chosen; whatever else it holds is ignored.
    rate: how far a bias moves; scalar.
    direction: of the balance kind.

  Returns:
    A new nested dict like `buffers`; arrays of other names are the same objects.

  Raises:
    ValueError: a bias has no load beside it, or one of another shape.
  """
  update = functools.partial(update_bias, rate=rate, direction=direction)
  return _update_level(buffers, observed, update, ())


def _update_level(
  buffers: Mapping[str, Any],
  observed: Any,
  update: Callable[..., jax.Array],
  parents: tuple[str, ...],
) -> dict[str, Any]:
  """One level of `update_buffers`; `observed` is at the same place of the other tree."""
  seen = observed if isinstance(observed, Mapping) else {}
  updated: dict[str, Any] = {}
  for name, value in buffers.items():
    address = (*parents, name)
    if isinstance(value, Mapping):
      updated[name] = _update_level(value, seen.get(name), update, address)
    elif name == BIAS:
      updated[name] = update(value, _load_beside(value, seen, address), allowed=seen.get(ALLOWED))
    else:
      updated[name] = value
  return updated


def _load_beside(bias: jax.Array, seen: Mapping[str, Any], address: tuple[str, ...]) -> jax.Array:
  """Finds the load that belongs to a bias."""
  where = '/'.join((*address[:-1], LOAD))
  if LOAD not in seen:
    raise ValueError(
      f'{"/".join(address)!r} needs {where!r} in observed, found {sorted(seen) or "nothing"} there'
    )
  load = seen[LOAD]
  if load.shape != bias.shape:
    raise ValueError(
      f'{where!r} has shape {load.shape}, expected {bias.shape} like {"/".join(address)!r}'
    )
  return load


def max_violation(load: jax.Array) -> jax.Array:
  """How far the busiest expert is above the mean load, as a share of the mean; 0 is even.

  Args:
    load: tokens that chose each expert, [..., E].

  Returns:
    float32 [...]; 0 where no token chose at all.

  Source: Wang et al. (arXiv 2408.15664), equation 4 (MaxVio).
  """
  load = load.astype(jnp.float32)
  mean = load.mean(axis=-1)
  return jnp.where(mean > 0, load.max(axis=-1) / jnp.where(mean > 0, mean, 1) - 1, 0)


def dead_fraction(load: jax.Array) -> jax.Array:
  """The share of experts that no token chose.

  Args:
    load: tokens that chose each expert, [..., E].

  Returns:
    float32 [...] in [0, 1].
  """
  return (load == 0).astype(jnp.float32).mean(axis=-1)


def load_entropy(load: jax.Array) -> jax.Array:
  """How evenly tokens spread over experts: 1 is perfectly even, 0 is all on one expert.

  Args:
    load: tokens that chose each expert, [..., E]; E is at least 2.

  Returns:
    Entropy of the load's shares over log E, float32 [...]; 0 where no token chose at all.

  Raises:
    ValueError: there are fewer than two experts, where evenness means nothing.
  """
  if load.shape[-1] < 2:
    raise ValueError(f'load_entropy: found {load.shape[-1]} experts, expected at least 2')
  load = load.astype(jnp.float32)
  total = load.sum(axis=-1, keepdims=True)
  share = load / jnp.where(total > 0, total, 1)
  return jax.scipy.special.entr(share).sum(axis=-1) / jnp.log(jnp.float32(load.shape[-1]))
