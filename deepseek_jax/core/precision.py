"""The number format a run computes in; parameters are float32 whatever it is."""

import dataclasses

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.loss_scale import GradientNorm, LossScale


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float32:
  """Computes in float32: 24 bits of precision, exact enough to compare runs by."""

  @property
  def compute(self) -> str:
    """The name of the compute dtype."""
    return 'float32'

  @property
  def scaling(self) -> None:
    """No factor on the loss: the range is wide enough."""
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BFloat16:
  """Computes in bfloat16: float32's range, 8 bits of precision, half the bytes."""

  @property
  def compute(self) -> str:
    """The name of the compute dtype."""
    return 'bfloat16'

  @property
  def scaling(self) -> None:
    """No factor on the loss: the range is wide enough."""
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float16:
  """Computes in float16: 11 bits of precision, but a range that gradients leave without scaling.

  Attributes:
    scaling: how the factor on the loss is chosen; steps that overflow are skipped.
      `Static(scale=1.0)` is no factor.
  """

  scaling: LossScale = GradientNorm()

  @property
  def compute(self) -> str:
    """The name of the compute dtype."""
    return 'float16'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fastest:
  """Float32 or bfloat16, whichever this machine multiplies faster; measured before a run begins."""

  @property
  def compute(self) -> str:
    """There is none before the measurement.

    Raises:
      ConfigError: always; put Float32 or BFloat16 in the place of this kind first.
    """
    raise ConfigError('`Fastest` has no dtype until it is measured; choose Float32 or BFloat16')

  @property
  def scaling(self) -> None:
    """No factor on the loss, whichever it will be."""
    return None


Precision = Float32 | BFloat16 | Float16 | Fastest
