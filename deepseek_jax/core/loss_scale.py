"""Factors on the loss that keep float16 gradients inside float16's narrow range.

float16 holds magnitudes from 2⁻²⁴ to 65504; many gradients are smaller. The loss is multiplied by a
scale before the backward pass and the gradients are divided by it in float32. Too small a scale
loses small gradients to zero (underflow), too large a one gives infinities (overflow): the step is
then skipped, and the kind says how the scale goes on. Scales are powers of two, so that neither the
product nor the division rounds.

Source: Micikevicius et al., arXiv 1710.03740, section 3.2.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.core.config import ConfigError

LARGEST = 65504.0
"""The largest finite float16."""


class ScaleState(NamedTuple):
  """What a rule remembers between steps; the same scalars for every kind.

  Attributes:
    scale: [] float32, the factor of the next step.
    clean: [] int32, steps without overflow since the last change that an overflow or growth made.
    seen: [] int32, gradient norms in the statistics.
    mean: [] float32, running mean of log2 of the gradient norm.
    variance: [] float32, its running variance.
    penalty: [] float32, bits that overflows took off the scale.
  """

  scale: jax.Array
  clean: jax.Array
  seen: jax.Array
  mean: jax.Array
  variance: jax.Array
  penalty: jax.Array


def start_scale(scale: float) -> ScaleState:
  """Returns the state of a rule that has seen nothing, with a scale to begin at."""
  zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
  return ScaleState(jnp.full((), scale, jnp.float32), none, none, zero, zero, zero)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
  """One scale for the whole run.

  Attributes:
    scale: the factor; a power of two.
  """

  scale: float = 2.0**12

  def __post_init__(self):
    _check(self, powers=('scale',))

  def start(self) -> ScaleState:
    """Returns the state before the first step."""
    return start_scale(self.scale)

  def update(self, state: ScaleState, overflow: jax.Array, norm: jax.Array) -> ScaleState:
    """Returns the state as it is: nothing moves this scale."""
    return state


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackOff:
  """Halves the scale after an overflow; doubles it after a number of steps without one.

  It finds the range by running into its end: each doubling is a guess that costs a step when it is
  wrong.

  Attributes:
    initial: the first scale; a power of two.
    interval: steps without overflow after which the scale doubles.
    minimum: the scale never falls below it; a power of two.
    maximum: nor rises above it; a power of two.

  Source: Micikevicius et al., arXiv 1710.03740, section 3.2; the defaults are those of PyTorch's
    `GradScaler`.
  """

  initial: float = 2.0**16
  interval: int = 2000
  minimum: float = 2.0**-10
  maximum: float = 2.0**24

  def __post_init__(self):
    _check(self, powers=('initial', 'minimum', 'maximum'), counts=('interval',))

  def start(self) -> ScaleState:
    """Returns the state before the first step."""
    return start_scale(self.initial)

  def update(self, state: ScaleState, overflow: jax.Array, norm: jax.Array) -> ScaleState:
    """Returns the state after a step.

    Args:
      state: before the step.
      overflow: [] bool, whether a gradient was not finite.
      norm: [] float32 gradient norm, scale divided out; of no meaning after an overflow.
    """
    clean = jnp.where(overflow, 0, state.clean + 1)
    grown = clean >= self.interval
    factor = jnp.where(overflow, 0.5, jnp.where(grown, 2.0, 1.0))
    scale = jnp.clip(state.scale * factor, self.minimum, self.maximum)
    return state._replace(scale=scale, clean=jnp.where(grown, 0, clean))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientNorm:
  """Foresees the next gradient norm from those before, and puts the scale safely below the end.

  With m and s the running mean and standard deviation of log2 ‖g‖, the next step's scale is

    2 ^ floor(log2(65504) − headroom − penalty − (m + deviations · s))

  No entry of a weight's gradient exceeds the norm, so that the scaled gradients stay finite while
  the norm stays below `deviations` and `headroom` above its mean. Gradients of activations obey no
  such bound, and norms jump: an overflow that comes all the same adds one bit of `penalty`, and
  `forgiving_steps` without one take it back.

  Attributes:
    first: scale of the first step, when no norm is known; a power of two.
    decay: how much of the running statistics is kept each step.
    deviations: standard deviations of log2 ‖g‖ to allow for.
    headroom: bits kept free besides.
    forgiving_steps: steps without overflow that take a bit of penalty back.
    minimum: the scale never falls below it; a power of two.
    maximum: nor rises above it; a power of two.
  """

  first: float = 2.0**8
  decay: float = 0.95
  deviations: float = 3.0
  headroom: float = 2.0
  forgiving_steps: int = 200
  minimum: float = 2.0**-10
  maximum: float = 2.0**24

  def __post_init__(self):
    _check(self, powers=('first', 'minimum', 'maximum'), counts=('forgiving_steps',))
    errors = [
      f'GradientNorm.{name}: found {getattr(self, name)}, expected a number of at least 0'
      for name in ('deviations', 'headroom')
      if not getattr(self, name) >= 0
    ]
    if not 0 <= self.decay < 1:
      errors.append(f'GradientNorm.decay: found {self.decay}, expected a share in [0, 1)')
    if errors:
      raise ConfigError(errors)

  def start(self) -> ScaleState:
    """Returns the state before the first step."""
    return start_scale(self.first)

  def update(self, state: ScaleState, overflow: jax.Array, norm: jax.Array) -> ScaleState:
    """Returns the state after a step; the arguments are those of `BackOff.update`."""
    clean = jnp.where(overflow, 0, state.clean + 1)
    forgiven = clean >= self.forgiving_steps
    penalty = state.penalty + overflow - forgiven
    # A plain mean of the first norms, a running one after them: no bias towards zero.
    share = jnp.maximum(1 - self.decay, 1 / (state.seen + 1).astype(jnp.float32))
    share = jnp.where(overflow, 0, share)
    bits = jnp.log2(jnp.maximum(jnp.where(overflow, 1, norm), 1e-30))
    away = bits - state.mean
    mean = state.mean + share * away
    variance = (1 - share) * (state.variance + share * away**2)
    seen = state.seen + jnp.where(overflow, 0, 1)
    new = ScaleState(
      scale=state.scale,
      clean=jnp.where(forgiven, 0, clean),
      seen=seen,
      mean=mean,
      variance=variance,
      penalty=jnp.maximum(penalty, 0),
    )
    return new._replace(scale=self._choose(new))

  def _choose(self, state: ScaleState) -> jax.Array:
    expected = state.mean + self.deviations * jnp.sqrt(state.variance)
    room = math.log2(LARGEST) - self.headroom - expected
    room = jnp.where(state.seen > 0, room, math.log2(self.first))
    # ldexp is exact where exp2 of a whole number may not be.
    scale = jnp.ldexp(jnp.float32(1), jnp.floor(room - state.penalty).astype(jnp.int32))
    return jnp.clip(scale, self.minimum, self.maximum)


LossScale = Static | BackOff | GradientNorm


def _check(config: object, powers: tuple[str, ...], counts: tuple[str, ...] = ()) -> None:
  """Raises one error with every field that is no power of two, or no count."""
  kind, errors = type(config).__name__, []
  for name in powers:
    value = getattr(config, name)
    if not 0 < value < math.inf or math.frexp(value)[0] != 0.5:
      errors.append(f'{kind}.{name}: found {value}, expected a power of two, such as 4096.0')
  for name in counts:
    if getattr(config, name) < 1:
      errors.append(f'{kind}.{name}: found {getattr(config, name)}, expected 1 or more')
  low, high = (getattr(config, name, None) for name in ('minimum', 'maximum'))
  if not errors and low is not None and not low <= getattr(config, powers[0]) <= high:
    found = getattr(config, powers[0])
    errors.append(
      f'{kind}.{powers[0]}: found {found}, expected `minimum` {low} to `maximum` {high}'
    )
  if errors:
    raise ConfigError(errors)
