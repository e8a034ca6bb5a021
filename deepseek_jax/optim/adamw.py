"""AdamW: Adam with weight decay applied to the weights themselves."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.optim.check import check_fields
from deepseek_jax.optim.dimension import decay_mask
from deepseek_jax.optim.schedule import ScheduleFn

MomentFormat = Literal['float32', 'bfloat16']

MOMENT_FORMATS = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
  """Adam with decoupled weight decay on matrices, the optimizer of DeepSeek-V1 to V3.

  The learning rate of update k, counted from 0, is `peak_lr * schedule_fn(k)`.

  Attributes:
    peak_lr: learning rate where the schedule's factor is 1.
    beta1: how much of the mean gradient is kept each step.
    beta2: how much of the mean squared gradient is kept each step.
    epsilon: added to the root of the mean squared gradient.
    weight_decay: share of a matrix removed each step, times the learning rate.
    clip_norm: gradients whose global norm exceeds this are scaled down to it; None never clips.
    moments: number format the two running means are stored in; arithmetic is float32.

  Source: Loshchilov & Hutter (arXiv 1711.05101); values and bfloat16 moments of DeepSeek-V3
    (arXiv 2412.19437) sections 4.2 and 3.3.3.
  """

  peak_lr: float
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float | None = 1.0
  moments: MomentFormat = 'float32'

  traced = ('peak_lr', 'weight_decay')

  def __post_init__(self):
    """Validates the fields.

    Raises:
      ConfigError: a field is out of its range.
    """
    check_fields(
      self,
      {
        'peak_lr': (self.peak_lr > 0, 'a number above 0'),
        'beta1': (0 <= self.beta1 < 1, 'a number in [0, 1)'),
        'beta2': (0 <= self.beta2 < 1, 'a number in [0, 1)'),
        'epsilon': (self.epsilon > 0, 'a number above 0'),
        'weight_decay': (self.weight_decay >= 0, 'a number of at least 0'),
        'clip_norm': (self.clip_norm is None or self.clip_norm > 0, 'None or a number above 0'),
        'moments': (self.moments in MOMENT_FORMATS, f'one of {MOMENT_FORMATS}'),
      },
    )

  def build(self, schedule_fn: ScheduleFn, axes: Any) -> optax.GradientTransformation:
    """Returns the pair of pure functions that turns gradients into updates.

    Args:
      schedule_fn: factor of `peak_lr` by step.
      axes: like the parameters, with a tuple of logical axis names for each leaf.
    """
    return optax.chain(
      clip_in_float32(self.clip_norm),
      scale_by_moments(self.beta1, self.beta2, self.epsilon, self.moments),
      optax.add_decayed_weights(self.weight_decay, decay_mask(axes)),
      optax.scale_by_learning_rate(lambda step: self.peak_lr * schedule_fn(step)),
    )


def clip_in_float32(clip_norm: float | None) -> optax.GradientTransformation:
  """Casts gradients to float32 and scales them down to a global norm.

  Everything after it is then float32, also when gradients arrive in bfloat16, where a sum of
  squares over all weights would lose its small terms.

  Args:
    clip_norm: the largest global norm let through; None lets all through.
  """
  cast = optax.stateless(lambda updates, params: optax.tree.cast(updates, jnp.float32))
  if clip_norm is None:
    return cast
  return optax.chain(cast, optax.clip_by_global_norm(clip_norm))


def scale_by_moments(
  beta1: float, beta2: float, epsilon: float, moments: MomentFormat
) -> optax.GradientTransformation:
  """Adam's direction, with both running means stored in one number format.

  `optax.scale_by_adam` can store the first mean in bfloat16 but not the second; here both are
  widened to float32 before its arithmetic and rounded to the format after it.

  Args:
    beta1: how much of the mean gradient is kept each step.
    beta2: how much of the mean squared gradient is kept each step.
    epsilon: added to the root of the mean squared gradient.
    moments: number format of the stored means.
  """
  inner = optax.scale_by_adam(b1=beta1, b2=beta2, eps=epsilon)

  def init(params: optax.Params) -> optax.OptState:
    return _cast_floats(inner.init(params), moments)

  def update(
    updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
  ) -> tuple[optax.Updates, optax.OptState]:
    wide = optax.tree.cast(updates, jnp.float32)
    direction, new_state = inner.update(wide, _cast_floats(state, 'float32'), params)
    return direction, _cast_floats(new_state, moments)

  return optax.GradientTransformation(init, update)


def _cast_floats(tree: Any, dtype: MomentFormat) -> Any:
  """Casts the floating leaves of an optimizer state; its step counter stays an integer."""
  return jax.tree.map(
    lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
  )
