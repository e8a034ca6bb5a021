"""Measures what an exchange between replicas costs, and sets how often there is one."""

import dataclasses
import math
import statistics
from collections import deque

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax.optim.compression import Adaptive, LocalSteps
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.state import TrainState

FEWEST = 2
"""Steps of either sort that a measurement needs; the very first may still be warming up."""


@dataclasses.dataclass(frozen=True)
class Measured:
  """What was measured, and what follows from it.

  Attributes:
    step_seconds: median of steps without an exchange.
    exchange_seconds: how much longer the median step with one takes.
    steps: between exchanges from now on.
  """

  step_seconds: float
  exchange_seconds: float
  steps: int

  def __str__(self) -> str:
    """One line for the terminal."""
    return (
      f'a step takes {self.step_seconds:.3f} s, an exchange {self.exchange_seconds:.3f} s more: '
      f'replicas meet every {self.steps} steps'
    )


class Link:
  """Times steps with and without an exchange; what hides behind the computation costs nothing.

  Attributes:
    kind: says how many steps follow from the seconds.
  """

  def __init__(self, kind: Adaptive, window: int = 9):
    """Starts with no measurement.

    Args:
      kind: says how many steps follow from the seconds.
      window: medians are taken over this many of the last steps of either sort.
    """
    self.kind = kind
    self._seconds: dict[bool, deque[float]] = {
      exchanged: deque(maxlen=window) for exchanged in (False, True)
    }
    self._due = False

  def tick(self, seconds: float | None, *, exchanged: bool) -> None:
    """Takes the time of a finished step.

    Args:
      seconds: of the step; None where it was not timed.
      exchanged: whether replicas exchanged in it.
    """
    if seconds is not None:
      self._seconds[exchanged].append(seconds)
    self._due |= exchanged

  def take(self) -> Measured | None:
    """Returns what is known after an exchange, once; None until there is enough, or in between."""
    due, self._due = self._due, False
    if not due or min(map(len, self._seconds.values())) < FEWEST:
      return None
    step, met = (statistics.median(self._seconds[exchanged]) for exchanged in (False, True))
    return Measured(step, met - step, self.kind.steps(step, met - step))


def open_link(experiment: Experiment) -> Link | None:
  """Returns the link of a run whose interval adapts; None where it does not, or nothing crosses."""
  kind = experiment.reduction
  if not isinstance(kind, LocalSteps) or not isinstance(kind.interval, Adaptive):
    return None
  return None if experiment.mesh.replica == 1 else Link(kind.interval)


def agreed(measured: Measured) -> Measured:
  """Returns what the first process has measured; all of them call it after the same step."""
  if jax.process_count() == 1:
    return measured
  mine = np.array([measured.step_seconds, measured.exchange_seconds, measured.steps], np.float32)
  step, exchange, steps = map(float, multihost_utils.broadcast_one_to_all(mine))
  return Measured(step, exchange, math.floor(steps + 0.5))


def with_interval(state: TrainState, steps: int) -> TrainState:
  """Returns the state whose replicas meet every so many steps from now on."""
  old = state.carry['interval']
  new = jax.device_put(np.int32(steps), old.sharding)
  return dataclasses.replace(state, carry={**state.carry, 'interval': new})
