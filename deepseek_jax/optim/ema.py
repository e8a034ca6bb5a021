"""Averaged weights: a running mean of the weights over training, often better than the last."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.optim.check import check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class EMA:
  """An exponential moving average of the weights, made anew after each accepted step.

  Early on, when the first weights are worth nothing, it remembers less:
  decay(n) = min(decay, (1 + n) / (warmup_steps + n)) after n updates.

  Attributes:
    decay: how much of the average is kept each step; 1 / (1 - decay) steps are its memory.
    warmup_steps: how slowly the decay grows to that; 1 for the full decay from the start.

  Source: Polyak & Juditsky, SIAM J. Control Optim. 30 (1992); the warm-up is TensorFlow's
    `ExponentialMovingAverage` with `num_updates`. DeepSeek-V3, arXiv 2412.19437, section 3.2.3,
    keeps such an average too.
  """

  decay: float = 0.999
  warmup_steps: int = 10

  def __post_init__(self):
    """Validates the fields.

    Raises:
      ConfigError: a field is out of its range.
    """
    check_fields(
      self,
      {
        'decay': (0 <= self.decay < 1, 'a share in [0, 1)'),
        'warmup_steps': (self.warmup_steps >= 1, 'a count of at least 1'),
      },
    )

  def update(self, average: Any, params: Any, updates: jax.Array) -> Any:
    """Returns the average after a step.

    Args:
      average: of the weights before the step; float32 pytree.
      params: the weights after the step; a pytree like it.
      updates: [] int32, accepted steps before this one.
    """
    count = updates.astype(jnp.float32)
    decay = jnp.minimum(self.decay, (1 + count) / (self.warmup_steps + count))
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), average, params)
