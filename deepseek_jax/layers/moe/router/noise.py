"""Noise in the choice of experts, so that those that are seldom chosen are tried; training only."""

import dataclasses
from typing import Protocol

import flax.linen as nn
import jax

from deepseek_jax.core.config import ConfigError


class Noise(Protocol):
  """What a noise kind offers."""

  def disturb_input(self, x: jax.Array, key: jax.Array) -> jax.Array:
    """Returns what the router reads, float32 [B, T, D], disturbed."""

  def disturb_logits(self, logits: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the logits that decide, float32 [N, E], disturbed; the weights do not see it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gumbel:
  """Gumbel noise on the logits that decide.

  With softmax scores and `scale` 1, the choice is a draw of K experts by their probabilities,
  without putting back.

  Attributes:
    scale: factor on the noise.

  Source: Kool et al., arXiv 1903.06059, section 3.
  """

  scale: float = 1.0

  def __post_init__(self):
    _check_size('scale', self.scale)

  def disturb_input(self, x: jax.Array, key: jax.Array) -> jax.Array:
    """Returns `x` [B, T, D] as it is."""
    return x

  def disturb_logits(self, logits: jax.Array, key: jax.Array) -> jax.Array:
    """Adds noise to logits [N, E]."""
    return logits + self.scale * jax.random.gumbel(key, logits.shape, logits.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian:
  """Normal noise on the logits that decide.

  The paper learns the standard deviation of each expert and lets the weights see the noise; here
  it is one number, and they do not.

  Attributes:
    std: standard deviation.

  Source: Shazeer et al., arXiv 1701.06538, section 2.1 (noisy top-k gating).
  """

  std: float = 1.0

  def __post_init__(self):
    _check_size('std', self.std)

  def disturb_input(self, x: jax.Array, key: jax.Array) -> jax.Array:
    """Returns `x` [B, T, D] as it is."""
    return x

  def disturb_logits(self, logits: jax.Array, key: jax.Array) -> jax.Array:
    """Adds noise to logits [N, E]."""
    return logits + self.std * jax.random.normal(key, logits.shape, logits.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jitter:
  """Multiplies what the router reads by uniform noise around 1; the weights see it too.

  Attributes:
    amount: factors lie between 1 − `amount` and 1 + `amount`.

  Source: Fedus et al. (Switch Transformers), arXiv 2101.03961, section 2.4.
  """

  amount: float = 1e-2

  def __post_init__(self):
    _check_size('amount', self.amount)
    if self.amount >= 1:
      raise ConfigError(f'`amount` is {self.amount}; expected less than 1')

  def disturb_input(self, x: jax.Array, key: jax.Array) -> jax.Array:
    """Multiplies `x` [B, T, D]."""
    low, high = 1 - self.amount, 1 + self.amount
    return x * jax.random.uniform(key, x.shape, x.dtype, low, high)

  def disturb_logits(self, logits: jax.Array, key: jax.Array) -> jax.Array:
    """Returns `logits` [N, E] as they are."""
    return logits


def noise_key(module: nn.Module, noise: Noise | None) -> jax.Array | None:
  """Returns a key of this layer's noise; None where there is none, as outside training."""
  return module.make_rng('noise') if noise is not None and module.has_rng('noise') else None


def _check_size(name: str, size: float) -> None:
  if not size > 0:
    raise ConfigError(f'`{name}` is {size}; expected a number above 0, or `noise` None')
