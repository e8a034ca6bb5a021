"""A few numbers of every process, brought to all of them about once a second while they train.

It is one small collective between two steps, read a step later, so that nobody waits for it. All
processes send and read at the same steps: what they decide by it, they decide alike.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Pulse:
  """Gathers a row of numbers from each process; see the module.

  Attributes:
    seconds: from one gathering to the next, about.
  """

  def __init__(self, width: int, seconds: float = 1.0):
    """Compiles the collective over one device of each process.

    Args:
      width: numbers of a process.
      seconds: from one gathering to the next, about.
    """
    self.seconds = seconds
    firsts: dict[int, jax.Device] = {}
    for device in jax.devices():
      firsts.setdefault(device.process_index, device)
    mesh = Mesh(np.array([firsts[index] for index in sorted(firsts)]), ('process',))
    self._shape = (len(firsts), width)
    self._own = NamedSharding(mesh, PartitionSpec('process'))
    everywhere = NamedSharding(mesh, PartitionSpec())
    shape = jax.ShapeDtypeStruct(self._shape, np.float32, sharding=self._own)
    gather = jax.jit(lambda x: x, in_shardings=self._own, out_shardings=everywhere)
    self._gather = gather.lower(shape).compile()
    self._pending: jax.Array | None = None
    self._due = 0

  def due(self, step: int) -> bool:
    """Whether the processes gather after this step."""
    return step >= self._due

  def send(self, step: int, row: Sequence[float]) -> None:
    """Sends this process's numbers off; call it at steps that are `due`, in all processes.

    Args:
      step: that was dispatched last.
      row: `width` numbers.
    """
    local = np.asarray([row], np.float32)
    array = jax.make_array_from_process_local_data(self._own, local, self._shape)
    self._pending = self._gather(array)
    # Until `receive` says how long a step takes, the next one is due.
    self._due = step + 1

  def receive(self) -> np.ndarray | None:
    """Returns the numbers sent last, [processes, width] float32, once; None if none are."""
    pending, self._pending = self._pending, None
    return None if pending is None else np.asarray(pending)

  def pace(self, step: int, step_seconds: float) -> None:
    """Sets when the next gathering is due, by a time that all processes know alike.

    Args:
      step: of now.
      step_seconds: of the slowest process.
    """
    steps = self.seconds / step_seconds if step_seconds > 0 else 1
    self._due = step + max(1, math.floor(min(steps, 1e6)))
