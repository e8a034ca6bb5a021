"""Auxiliary losses that even out the load of experts."""

import dataclasses

import jax

from deepseek_jax.core.config import ConfigError
from deepseek_jax.ops import balance


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceBalance:
  """Keeps the load even within each sequence, as the raw scores would have it.

  Attributes:
    weight: factor α on the loss; small, since the router's bias does the main work.

  Source: DeepSeek-V3, arXiv 2412.19437, equations 17 to 20.
  """

  weight: float = 1e-4

  def __post_init__(self):
    _check(self.weight)

  def check(self, experts: int) -> list[str]:
    """Returns what is wrong with balancing `experts` experts, as messages: never anything."""
    return []

  def __call__(self, scores: jax.Array, experts: jax.Array, real: jax.Array) -> jax.Array:
    """Returns the weighted loss, summed over sequences.

    Args:
      scores: [B, T, E] float32.
      experts: [B, T, K] int32 choices; E is nobody.
      real: [B, T] bool.
    """
    return self.weight * balance.sequence_balance(scores, experts, real)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchBalance:
  """Keeps the load even over the whole batch; sequences may specialise.

  With accumulation, the batch is one microbatch.

  Attributes:
    weight: factor on the loss.

  Source: Qiu et al., arXiv 2501.11873, equation 4.
  """

  weight: float = 1e-2

  def __post_init__(self):
    _check(self.weight)

  def check(self, experts: int) -> list[str]:
    """Returns what is wrong with balancing `experts` experts, as messages: never anything."""
    return []

  def __call__(self, scores: jax.Array, experts: jax.Array, real: jax.Array) -> jax.Array:
    """Returns the weighted loss times the sequences; see `SequenceBalance`; real [B, T]."""
    return self.weight * balance.batch_balance(scores, experts, real)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertBalance:
  """Keeps the load even within each sequence, as it was chosen.

  Attributes:
    weight: factor α₁ on the loss (V2 0.003, V2-Lite 0.001, the 2B model of V1 0.01).

  Source: DeepSeek-V2, arXiv 2405.04434, equations 23 to 25.
  """

  weight: float = 3e-3

  def __post_init__(self):
    _check(self.weight)

  def check(self, experts: int) -> list[str]:
    """Returns what is wrong with balancing `experts` experts, as messages: never anything."""
    return []

  def __call__(self, scores: jax.Array, experts: jax.Array, real: jax.Array) -> jax.Array:
    """Returns the weighted loss, summed over sequences; see `SequenceBalance`; real [B, T]."""
    return self.weight * balance.expert_balance(scores, experts, real)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceBalance:
  """Keeps the load of devices even, each of which holds a group of neighbouring experts.

  Attributes:
    devices: how many share the experts; it need not be this run's mesh.
    weight: factor α₂ on the loss.

  Source: DeepSeek-V2, arXiv 2405.04434, equations 26 to 28.
  """

  devices: int
  weight: float = 0.05

  def __post_init__(self):
    _check(self.weight, devices=self.devices)

  def check(self, experts: int) -> list[str]:
    """Returns what is wrong with balancing `experts` experts, as messages."""
    return _uneven(self.devices, experts)

  def __call__(self, scores: jax.Array, experts: jax.Array, real: jax.Array) -> jax.Array:
    """Returns the weighted loss, summed over sequences; see `SequenceBalance`; real [B, T]."""
    return self.weight * balance.device_balance(scores, experts, real, self.devices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommunicationBalance:
  """Keeps even what devices are sent, each of which holds a group of neighbouring experts.

  Attributes:
    devices: how many share the experts; it need not be this run's mesh.
    kept: devices M that a token is sent to at most, as `kept_groups` of the router.
    weight: factor α₃ on the loss.

  Source: DeepSeek-V2, arXiv 2405.04434, equations 29 to 31.
  """

  devices: int
  kept: int
  weight: float = 0.02

  def __post_init__(self):
    _check(self.weight, devices=self.devices, kept=self.kept)
    if self.kept > self.devices:
      raise ConfigError(f'`kept` is {self.kept}, more than the {self.devices} `devices` there are')

  def check(self, experts: int) -> list[str]:
    """Returns what is wrong with balancing `experts` experts, as messages."""
    return _uneven(self.devices, experts)

  def __call__(self, scores: jax.Array, experts: jax.Array, real: jax.Array) -> jax.Array:
    """Returns the weighted loss, summed over sequences; see `SequenceBalance`; real [B, T]."""
    loss = balance.communication_balance(scores, experts, real, self.devices, self.kept)
    return self.weight * loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Several:
  """The sum of several balance losses, as DeepSeek-V2 has three.

  Attributes:
    losses: what is summed.
  """

  losses: tuple[
    SequenceBalance | BatchBalance | ExpertBalance | DeviceBalance | CommunicationBalance, ...
  ]

  def __post_init__(self):
    if not self.losses:
      raise ConfigError('`losses` is empty; expected 1 or more, or `balance` None')

  def check(self, experts: int) -> list[str]:
    """Returns what is wrong with balancing `experts` experts, as messages."""
    return [message for loss in self.losses for message in loss.check(experts)]

  def __call__(self, scores: jax.Array, experts: jax.Array, real: jax.Array) -> jax.Array:
    """Returns the sum of the weighted losses; see `SequenceBalance`; real [B, T]."""
    first, *rest = (loss(scores, experts, real) for loss in self.losses)
    return sum(rest, first)


def _check(weight: float, **counts: int) -> None:
  errors = [f'`{name}` is {n}; expected 1 or more' for name, n in counts.items() if n < 1]
  if not weight > 0:
    errors.append(f'`weight` is {weight}; expected a number above 0, or `balance` None')
  if errors:
    raise ConfigError(errors)


def _uneven(devices: int, experts: int) -> list[str]:
  return [f'`devices` is {devices}, which does not divide {experts} experts'] * (
    experts % devices != 0
  )
