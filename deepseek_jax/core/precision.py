"""The number format a run computes in; parameters are float32 whatever it is."""

import dataclasses

from deepseek_jax.core.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float32:
  """Computes in float32: 24 bits of precision, exact enough to compare runs by."""

  @property
  def compute(self) -> str:
    """The name of the compute dtype."""
    return 'float32'


@dataclasses.dataclass(frozen=True, kw_only=True)
class BFloat16:
  """Computes in bfloat16: float32's range, 8 bits of precision, half the bytes."""

  @property
  def compute(self) -> str:
    """The name of the compute dtype."""
    return 'bfloat16'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fastest:
  """Whichever of the two this machine multiplies faster; measured before a run begins."""

  @property
  def compute(self) -> str:
    """There is none before the measurement.

    Raises:
      ConfigError: always; put Float32 or BFloat16 in the place of this kind first.
    """
    raise ConfigError('`Fastest` has no dtype until it is measured; choose Float32 or BFloat16')


Precision = Float32 | BFloat16 | Fastest
