"""Which process is slower than the others, though all take their steps together.

The time of a step does not tell: collectives make every process wait for the slowest. Two things
do: how long a process works on its own before a step (data), and how long its devices take for a
fixed piece of work while they have nothing else to do.
"""

import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.sharding.agreement import from_first

PROBE_SECONDS = 0.02
SLOWER = 1.3
"""Times the median of all processes, for the fixed piece of work, that make a straggler."""
HOST_SHARE = 0.1
"""Of a step's time: what a process may work longer on its own than the median process."""
_SIZE = 512


class Probe:
  """Times the same product on every device of this process."""

  def __init__(self, seconds: float = PROBE_SECONDS):
    """Compiles it, and has the first process say how often it is repeated.

    Args:
      seconds: that it takes about, on the first process.
    """

    def work(x: jax.Array, times: jax.Array) -> jax.Array:
      # What is multiplied stays as it is, so that the numbers stay in range.
      return jax.lax.fori_loop(0, times, lambda _, y: x @ (y / _SIZE), x)

    self._work = jax.jit(work)
    ones = np.ones((_SIZE, _SIZE), np.float32)
    self._operands = [jax.device_put(ones, device) for device in jax.local_devices()]
    self._times = 1
    self.seconds()  # compiles
    self._times = from_first(lambda: self._calibrate(seconds))

  def seconds(self) -> float:
    """Returns the time of the slowest device of this process; they are to have no other work."""
    begin = time.perf_counter()
    times = jnp.int32(self._times)
    jax.block_until_ready([self._work(x, jax.device_put(times, x.device)) for x in self._operands])
    return time.perf_counter() - begin

  def _calibrate(self, seconds: float) -> int:
    """How often the product fits into some time."""
    self._times = 8
    spent = min(self.seconds() for _ in range(3))
    return max(1, round(8 * seconds / spent))


def find_stragglers(
  probes: Sequence[float], hosts: Sequence[float], step_seconds: float
) -> dict[int, str]:
  """Says which processes are slower than the others by a margin, and at what.

  Args:
    probes: seconds of the fixed piece of work, by process.
    hosts: seconds that each process works on its own before a step.
    step_seconds: of a whole step.
  """
  found = {}
  # Of an even number the lower: of two processes the faster is the usual one.
  usual, own = statistics.median_low(probes), statistics.median_low(hosts)
  for index, (probe, host) in enumerate(zip(probes, hosts, strict=True)):
    reasons = []
    if probe > SLOWER * usual:
      reasons.append(f'its devices take {probe / usual:.2f} times as long as the others')
    if host - own > HOST_SHARE * step_seconds:
      reasons.append(f'it reads data for {host:.3f} s before each step, others for {own:.3f} s')
    if reasons:
      found[index] = ' and '.join(reasons)
  return found
