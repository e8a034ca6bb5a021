"""How fast a run is and how fast this device could be; measured, never looked up in a table."""

import contextlib
import math
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

Precision = Literal['float32', 'bfloat16']

_HOST_SIZES = (512, 1024, 2048)
_ACCELERATOR_SIZES = (2048, 4096, 8192)
# Rows N, inner width D, outer width F: a dense layer, 16 experts, one chunk of the vocabulary.
_DENSE = (2048, 256, 1024)
_EXPERTS = (16, 256, 256, 256)
_VOCABULARY = (512, 256, 8192)
# bfloat16 also pays for casting weights and gradients each step, which products alone do not show.
_WORTHWHILE_GAIN = 1.1


class Clock:
  """Times finished steps: leaves out compilation, evaluation and checkpoints.

  The caller blocks on a result of the step before it calls `tick`, so that what is timed is work
  that was done and not work that was queued.

  Attributes:
    tokens_per_step: tokens that one step reads, over all devices.
  """

  def __init__(
    self,
    tokens_per_step: int,
    window: int = 32,
    now: Callable[[], float] = time.perf_counter,
  ):
    """Starts with no measurement.

    Args:
      tokens_per_step: tokens that one step reads, over all devices.
      window: the median is taken over this many of the last intervals.
      now: the time in seconds.
    """
    self.tokens_per_step = tokens_per_step
    self._now = now
    self._mark: tuple[int, float] | None = None
    self._paused_seconds = 0.0
    self._intervals: deque[float] = deque(maxlen=window)

  def tick(self, step: int) -> None:
    """Says that a step is finished; the first call only starts the clock.

    The first step of a process compiles: call `tick` after it, and its time is left out.

    Args:
      step: the number of finished steps; several may lie between two calls.
    """
    now = self._now()
    if self._mark is not None and step > self._mark[0]:
      steps = step - self._mark[0]
      self._intervals.append((now - self._mark[1] - self._paused_seconds) / steps)
    self._mark = (step, now)
    self._paused_seconds = 0.0

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Leaves out the time spent in the `with` block."""
    start = self._now()
    try:
      yield
    finally:
      self._paused_seconds += self._now() - start

  @property
  def last_seconds(self) -> float | None:
    """Seconds of the step that was finished last; None before two steps are finished."""
    return self._intervals[-1] if self._intervals else None

  @property
  def step_seconds(self) -> float | None:
    """Median seconds of a finished step; None before two steps are finished."""
    return statistics.median(self._intervals) if self._intervals else None

  @property
  def tokens_per_second(self) -> float | None:
    """Tokens a second in finished steps; None before two steps are finished."""
    seconds = self.step_seconds
    return self.tokens_per_step / seconds if seconds else None

  def seconds_left(self, total_steps: int) -> float | None:
    """Seconds until the last step at the present pace, evaluation and checkpoints left out.

    Args:
      total_steps: the steps of the whole run.

    Returns:
      The estimate; None before two steps are finished.
    """
    seconds = self.step_seconds
    if seconds is None or self._mark is None:
      return None
    return max(0, total_steps - self._mark[0]) * seconds


def peak_memory_bytes() -> int:
  """The most memory used so far: of the busiest local device, or of this process on a CPU.

  Returns:
    Bytes.
  """
  stats = [device.memory_stats() for device in jax.local_devices()]
  peaks = [stat['peak_bytes_in_use'] for stat in stats if stat and 'peak_bytes_in_use' in stat]
  if peaks:
    return max(peaks)
  resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # Linux counts kilobytes here, macOS bytes.
  return resident if sys.platform == 'darwin' else resident * 1024


def measure_matmul_peak(dtype: Any, seconds: float = 1.0) -> float:
  """The fastest square matrix product this device does, the yardstick for utilisation.

  Args:
    dtype: of both operands and the result.
    seconds: time to spend, about.

  Returns:
    FLOP/s of the best of several sizes, on one device (for a CPU: all its cores).
  """
  sizes = _HOST_SIZES if jax.default_backend() == 'cpu' else _ACCELERATOR_SIZES
  best = 0.0
  for size in sizes:
    operands = (jnp.full((size, size), 0.5, dtype), jnp.full((size, size), 0.25, dtype))
    (spent,) = _best_seconds([(jnp.matmul, operands)], seconds / len(sizes))
    best = max(best, 2 * size**3 / spent)
  return best


def fastest_precision(seconds: float = 2.0) -> tuple[Precision, dict[str, dict[str, float]]]:
  """Which compute dtype trains faster here, by timing the products of a training step.

  Some processors multiply bfloat16 fast in the forward layout and slowly in that of the weight
  gradient: all three layouts of every product are timed and their times added. bfloat16 must be a
  tenth faster to be chosen, since it also costs casts and accuracy.

  Args:
    seconds: time to spend, about; compilation of six small programs comes on top.

  Returns:
    'float32' or 'bfloat16', and for each of the two the FLOP/s of 'forward', 'input_gradient',
    'weight_gradient' and of 'all' three together.
  """
  dtypes = ('float32', 'bfloat16')
  taken: dict[str, dict[str, float]] = {dtype: {} for dtype in dtypes}
  for layout, products in _LAYOUTS.items():
    # Both dtypes take turns, so that a busy moment of the machine does not fall on one of them.
    best = _best_seconds(
      [(products, _training_operands(layout, dtype)) for dtype in dtypes], seconds / len(_LAYOUTS)
    )
    for dtype, spent in zip(dtypes, best, strict=True):
      taken[dtype][layout] = spent
  rates = {
    dtype: {layout: _layout_flops() / spent for layout, spent in layouts.items()}
    | {'all': len(layouts) * _layout_flops() / sum(layouts.values())}
    for dtype, layouts in taken.items()
  }
  gain = rates['bfloat16']['all'] / rates['float32']['all']
  return ('bfloat16' if gain >= _WORTHWHILE_GAIN else 'float32'), rates


def _best_seconds(
  programs: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], budget: float
) -> list[float]:
  """Seconds of the fastest run of each program; they take turns, and compilation is left out."""
  compiled = [
    (jax.jit(function).lower(*operands).compile(), operands) for function, operands in programs
  ]
  best = [float('inf')] * len(compiled)
  start = time.perf_counter()
  while True:
    for index, (program, operands) in enumerate(compiled):
      begin = time.perf_counter()
      jax.block_until_ready(program(*operands))
      best[index] = min(best[index], time.perf_counter() - begin)
    if time.perf_counter() - start >= budget:
      return best


def _layout_flops() -> int:
  """FLOPs of the three products, the same in each layout."""
  return sum(2 * math.prod(size) for size in (_DENSE, _EXPERTS, _VOCABULARY))


def _training_operands(layout: str, dtype: str) -> tuple[jax.Array, ...]:
  """The pairs that a layout multiplies: dense, experts, vocabulary."""
  operands = []
  for size in (_DENSE, _EXPERTS, _VOCABULARY):
    *batch, rows, inner, outer = size
    x, w, g = ((*batch, rows, inner), (*batch, inner, outer), (*batch, rows, outer))
    pair = {'forward': (x, w), 'input_gradient': (g, w), 'weight_gradient': (x, g)}[layout]
    operands += [jnp.full(shape, 0.5, dtype) for shape in pair]
  return tuple(operands)


def _forward(*operands: jax.Array) -> tuple[jax.Array, ...]:
  """The outputs y = x·w of every pair (x [..., N, D], w [..., D, F])."""
  pairs = zip(operands[::2], operands[1::2])
  return tuple(jnp.einsum('...nd,...df->...nf', x, w) for x, w in pairs)


def _input_gradient(*operands: jax.Array) -> tuple[jax.Array, ...]:
  """The gradients dx = dy·wᵀ of every pair (dy [..., N, F], w [..., D, F])."""
  pairs = zip(operands[::2], operands[1::2])
  return tuple(jnp.einsum('...nf,...df->...nd', g, w) for g, w in pairs)


def _weight_gradient(*operands: jax.Array) -> tuple[jax.Array, ...]:
  """The gradients dw = xᵀ·dy of every pair (x [..., N, D], dy [..., N, F])."""
  pairs = zip(operands[::2], operands[1::2])
  return tuple(jnp.einsum('...nd,...nf->...df', x, g) for x, g in pairs)


_LAYOUTS: dict[str, Callable[..., tuple[jax.Array, ...]]] = {
  'forward': _forward,
  'input_gradient': _input_gradient,
  'weight_gradient': _weight_gradient,
}
