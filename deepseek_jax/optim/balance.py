"""Keeping a mixture of experts balanced by moving a bias, not by a loss.

Each expert has a bias that is added to its score when experts are chosen, and only then. After a
step, the bias of every expert with less than the mean load goes up by a fixed rate and that of
every expert with more goes down. No gradient is involved: the bias is a buffer, not a parameter.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.optim.check import check_fields
from deepseek_jax.optim.schedule import Constant, Schedule, ScheduleFn

BIAS = 'selection_bias'
LOAD = 'load'


@dataclasses.dataclass(frozen=True, kw_only=True)
class SignBias:
  """Moves each expert's selection bias by a fixed rate towards balance, each step.

  Attributes:
    rate: how far a bias moves in one step where the schedule's factor is 1.
    schedule: factor of the rate by step. DeepSeek-V3 stops for the last 500B of its 14.8T tokens:
      `MultiStep(warmup_steps=0, boundaries=(0.966,), factor=0.0)`.

  Source: DeepSeek-V3 (arXiv 2412.19437) section 2.1.2; Wang et al. (arXiv 2408.15664),
    algorithm 1.
  """

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


def update_bias(bias: jax.Array, load: jax.Array, rate: jax.typing.ArrayLike) -> jax.Array:
  """Raises the bias of experts with too little load and lowers it for those with too much.

  Args:
    bias: float [..., E].
    load: tokens that chose each expert, summed over the whole batch, [..., E].
    rate: how far a bias moves; scalar.

  Returns:
    The new bias [..., E], in the dtype of `bias`.

  Source: DeepSeek-V3 (arXiv 2412.19437) section 2.1.2.
  """
  load = load.astype(jnp.float32)
  # sign(mean − load) without the division, whose rounding could move a perfectly even load.
  direction = jnp.sign(load.sum(axis=-1, keepdims=True) - load.shape[-1] * load)
  return bias + (rate * direction).astype(bias.dtype)


def update_buffers(
  buffers: Mapping[str, Any], observed: Mapping[str, Any], rate: jax.typing.ArrayLike
) -> dict[str, Any]:
  """Applies `update_bias` to every selection bias in a model's buffers.

  Args:
    buffers: nested dict; arrays named 'selection_bias' have shape [..., E].
    observed: nested dict that has an array 'load' [..., E] beside each of them; whatever else it
      holds is ignored.
    rate: how far a bias moves; scalar.

  Returns:
    A new nested dict like `buffers`; arrays of other names are the same objects.

  Raises:
    ValueError: a bias has no load beside it, or one of another shape.
  """
  return _update_level(buffers, observed, rate, ())


def _update_level(
  buffers: Mapping[str, Any],
  observed: Any,
  rate: jax.typing.ArrayLike,
  parents: tuple[str, ...],
) -> dict[str, Any]:
  """One level of `update_buffers`; `observed` is at the same place of the other tree."""
  seen = observed if isinstance(observed, Mapping) else {}
  updated: dict[str, Any] = {}
  for name, value in buffers.items():
    address = (*parents, name)
    if isinstance(value, Mapping):
      updated[name] = _update_level(value, seen.get(name), rate, address)
    elif name == BIAS:
      updated[name] = update_bias(value, _load_beside(value, seen, address), rate)
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
