"""How a rate changes during training, as a dimensionless factor of its peak.

Every kind has `build(total_steps)`, which returns a function from a step (counted from 0) to a
float32 scalar that is 1.0 at the peak. The function can be traced under `jax.jit`. Whoever uses it
multiplies by the peak: the learning rate of update k is `peak_lr * schedule_fn(k)`.

Ends are handled alike in all kinds. Warm-up of W steps gives 1/(W+1), 2/(W+1), …, W/(W+1), so that
the first update already moves the weights and update W is the first at the peak. A decay reaches
`final` at step `total_steps`, one past the last update, so that the last update still moves them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core.config import ConfigError
from deepseek_jax.optim.check import check_fields

type ScheduleFn = Callable[[jax.typing.ArrayLike], jax.Array]
DecayShape = Literal['linear', 'cosine', 'sqrt']

_SHAPES = ('linear', 'cosine', 'sqrt')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
  """The same factor at every step.

  Attributes:
    value: the factor; 1.0 is the peak.
  """

  value: float = 1.0

  def __post_init__(self):
    """Validates the fields.

    Raises:
      ConfigError: the factor is negative.
    """
    check_fields(self, {'value': (self.value >= 0, 'a number of at least 0')})

  def build(self, total_steps: int) -> ScheduleFn:
    """Returns the factor as a function of the step; see the module's docstring."""
    _check_total(self, total_steps)
    return _as_float32(optax.constant_schedule(self.value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
  """Rises to the peak, stays there, and decays at the end: the shape of DeepSeek-V3 and V4.

  Attributes:
    warmup_steps: steps of linear warm-up; 0 starts at the peak.
    decay_fraction: the share of all steps that decays, at the end of training.
    final: the factor at the end of the decay.
    shape: how the decay falls. 'linear', 'cosine', or 'sqrt' (one minus the square root, which
      falls fast at first).

  Source: DeepSeek-V3 (arXiv 2412.19437) section 4.2; 'sqrt': Hägele et al. (arXiv 2405.18392).
  """

  warmup_steps: int
  decay_fraction: float = 0.3
  final: float = 0.1
  shape: DecayShape = 'cosine'

  def __post_init__(self):
    """Validates the fields.

    Raises:
      ConfigError: a field is out of its range.
    """
    check_fields(
      self,
      {
        'warmup_steps': _natural(self.warmup_steps),
        'decay_fraction': (0 <= self.decay_fraction <= 1, 'a share in [0, 1]'),
        'final': _share(self.final),
        'shape': (self.shape in _SHAPES, f'one of {_SHAPES}'),
      },
    )

  def build(self, total_steps: int) -> ScheduleFn:
    """Returns the factor as a function of the step; see the module's docstring.

    Args:
      total_steps: updates in the whole run.

    Raises:
      ConfigError: warm-up and decay together are longer than the run.
    """
    _check_total(self, total_steps)
    decay_steps = round(self.decay_fraction * total_steps)
    if self.warmup_steps + decay_steps > total_steps:
      raise ConfigError(
        f'WarmupStableDecay: warmup_steps={self.warmup_steps} and a decay of {decay_steps} steps '
        f'(decay_fraction={self.decay_fraction}) do not fit into total_steps={total_steps}'
      )
    stable_steps = total_steps - self.warmup_steps - decay_steps
    decay = _decay(self.shape, decay_steps, self.final)
    body = optax.join_schedules([optax.constant_schedule(1.0), decay], [stable_steps])
    return _after_warmup(self.warmup_steps, [body], [])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
  """Rises to the peak, then falls along half a cosine for the rest of training.

  Attributes:
    warmup_steps: steps of linear warm-up; 0 starts at the peak.
    final: the factor at the end of the decay.
  """

  warmup_steps: int
  final: float = 0.1

  def __post_init__(self):
    """Validates the fields.

    Raises:
      ConfigError: a field is out of its range.
    """
    check_fields(self, {'warmup_steps': _natural(self.warmup_steps), 'final': _share(self.final)})

  def build(self, total_steps: int) -> ScheduleFn:
    """Returns the factor as a function of the step; see the module's docstring.

    Args:
      total_steps: updates in the whole run.

    Raises:
      ConfigError: the warm-up is longer than the run.
    """
    body_steps = _steps_after_warmup(self, total_steps, self.warmup_steps)
    return _after_warmup(self.warmup_steps, [_decay('cosine', body_steps, self.final)], [])


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineWithRestarts:
  """Falls along half a cosine several times, jumping back to the peak between (SGDR).

  Attributes:
    warmup_steps: steps of linear warm-up before the first cycle; 0 starts at the peak.
    cycles: how many cosines fill the steps after the warm-up.
    growth: how much longer each cycle is than the one before.
    final: the factor at the end of every cycle.

  Source: Loshchilov & Hutter (arXiv 1608.03983), equation 5; `growth` is their T_mult.
  """

  warmup_steps: int
  cycles: int = 3
  growth: float = 2.0
  final: float = 0.1

  def __post_init__(self):
    """Validates the fields.

    Raises:
      ConfigError: a field is out of its range.
    """
    check_fields(
      self,
      {
        'warmup_steps': _natural(self.warmup_steps),
        'cycles': (isinstance(self.cycles, int) and self.cycles >= 1, 'a count of at least 1'),
        'growth': (self.growth > 0, 'a number above 0'),
        'final': _share(self.final),
      },
    )

  def build(self, total_steps: int) -> ScheduleFn:
    """Returns the factor as a function of the step; see the module's docstring.

    Args:
      total_steps: updates in the whole run.

    Raises:
      ConfigError: the warm-up is longer than the run, or a cycle would have no step.
    """
    body_steps = _steps_after_warmup(self, total_steps, self.warmup_steps)
    sizes = [self.growth**i for i in range(self.cycles)]
    # Round the ends, not the lengths: then the cycles fill the run exactly.
    ends = [round(body_steps * sum(sizes[: i + 1]) / sum(sizes)) for i in range(self.cycles)]
    lengths = [end - start for start, end in zip([0, *ends], ends)]
    if min(lengths) < 1:
      raise ConfigError(
        f'CosineWithRestarts: {body_steps} steps after the warm-up cannot hold cycles of '
        f'lengths {lengths}; lower cycles={self.cycles} or bring growth={self.growth} nearer to 1'
      )
    bodies = [_decay('cosine', length, self.final) for length in lengths]
    return _after_warmup(self.warmup_steps, bodies, ends[:-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiStep:
  """Rises to the peak, then drops by a constant factor at given points of training.

  Serves weights of losses too: a weight that goes from 0.3 to 0.1 after two thirds of training is
  0.3 times `MultiStep(warmup_steps=0, boundaries=(2 / 3,), factor=1 / 3)`.

  Attributes:
    warmup_steps: steps of linear warm-up; 0 starts at the peak.
    boundaries: the drops, as increasing shares of all steps.
    factor: what each drop multiplies by; 0.316 twice is a tenth.

  Source: DeepSeekMoE (arXiv 2401.06066) section 4.1.2 (0.8 and 0.9); DeepSeek-V2 (arXiv
    2405.04434) section 3.1.2 (0.6 and 0.9).
  """

  warmup_steps: int
  boundaries: tuple[float, ...] = (0.8, 0.9)
  factor: float = 0.316

  def __post_init__(self):
    """Validates the fields.

    Raises:
      ConfigError: a field is out of its range.
    """
    rising = all(low < high for low, high in zip(self.boundaries, self.boundaries[1:]))
    inside = all(0 < boundary < 1 for boundary in self.boundaries)
    check_fields(
      self,
      {
        'warmup_steps': _natural(self.warmup_steps),
        'boundaries': (
          isinstance(self.boundaries, tuple) and rising and inside,
          'a tuple of increasing shares in (0, 1)',
        ),
        'factor': (self.factor >= 0, 'a number of at least 0'),
      },
    )

  def build(self, total_steps: int) -> ScheduleFn:
    """Returns the factor as a function of the step; see the module's docstring.

    Args:
      total_steps: updates in the whole run.

    Raises:
      ConfigError: the warm-up is longer than the run, or reaches past the first drop.
    """
    _steps_after_warmup(self, total_steps, self.warmup_steps)
    drops: dict[int, float] = {}
    for boundary in self.boundaries:
      step = round(boundary * total_steps) - self.warmup_steps
      if step < 0:
        raise ConfigError(
          f'MultiStep: warmup_steps={self.warmup_steps} reaches past the drop at step '
          f'{step + self.warmup_steps} (boundary {boundary} of total_steps={total_steps})'
        )
      # In a very short run two drops fall on one step; neither may be lost.
      drops[step] = drops.get(step, 1.0) * self.factor
    return _after_warmup(self.warmup_steps, [optax.piecewise_constant_schedule(1.0, drops)], [])


Schedule = Constant | WarmupStableDecay | Cosine | CosineWithRestarts | MultiStep


def _natural(value: int) -> tuple[bool, str]:
  """Checks a count of steps."""
  return isinstance(value, int) and value >= 0, 'a whole number of at least 0'


def _share(value: float) -> tuple[bool, str]:
  """Checks a factor that may not exceed the peak."""
  return 0 <= value <= 1, 'a share of the peak in [0, 1]'


def _check_total(config: object, total_steps: int) -> None:
  """Raises if a run has no step."""
  if total_steps < 1:
    raise ConfigError(f'{type(config).__name__}: found total_steps={total_steps}, expected >= 1')


def _steps_after_warmup(config: object, total_steps: int, warmup_steps: int) -> int:
  """Returns how many steps the warm-up leaves; raises if it is longer than the run."""
  _check_total(config, total_steps)
  if warmup_steps > total_steps:
    raise ConfigError(
      f'{type(config).__name__}: found warmup_steps={warmup_steps}, '
      f'expected at most total_steps={total_steps}'
    )
  return total_steps - warmup_steps


def _decay(shape: DecayShape, steps: int, final: float) -> optax.Schedule:
  """Falls from 1 at step 0 to `final` at `steps`, and stays there."""

  def fall(step: jax.typing.ArrayLike) -> jax.Array:
    # Joined schedules are evaluated outside their range too, hence the clip; a decay of no steps
    # is only ever evaluated for runs that go on past their end.
    share = jnp.clip(jnp.asarray(step, jnp.float32) / max(steps, 1), 0, 1)
    match shape:
      case 'linear':
        left = 1 - share
      case 'cosine':
        left = 0.5 * (1 + jnp.cos(jnp.pi * share))
      case 'sqrt':
        left = 1 - jnp.sqrt(share)
    return final + (1 - final) * left

  return fall


def _after_warmup(
  warmup_steps: int, bodies: Sequence[optax.Schedule], boundaries: Sequence[int]
) -> ScheduleFn:
  """Joins bodies at boundaries counted from the end of the warm-up, and puts it in front."""
  if warmup_steps == 0:
    return _as_float32(optax.join_schedules(bodies, boundaries))
  rise = optax.linear_schedule(1 / (warmup_steps + 1), 1.0, warmup_steps)
  starts = [warmup_steps, *(warmup_steps + boundary for boundary in boundaries)]
  return _as_float32(optax.join_schedules([rise, *bodies], starts))


def _as_float32(schedule: optax.Schedule) -> ScheduleFn:
  """Makes a schedule return a float32 array whatever the type of the step."""
  return lambda step: jnp.asarray(schedule(jnp.asarray(step)), jnp.float32)
