"""One stage of a real pipeline: a process on a core of its own, told what to run by its parent.

`measure.py` starts one a stage. It speaks to its parent and to its neighbours through connections
of `multiprocessing`; arrays travel as NumPy's bytes.
"""

import os
import queue
import statistics
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

FLAGS = '--xla_cpu_multi_thread_eigen=false'
"""XLA's products on one thread: the process has one core."""


class Inbox:
  """What a neighbour has sent: received by a thread, so that nobody waits to send."""

  def __init__(self, connection: Connection | None):
    """Starts to receive; None is the end of the pipeline."""
    self.connection = connection
    self.found: queue.SimpleQueue = queue.SimpleQueue()
    if connection is not None:
      threading.Thread(target=self._receive, daemon=True).start()

  def _receive(self) -> None:
    assert self.connection is not None
    while True:
      try:
        self.found.put(self.connection.recv())
      except EOFError:
        return

  def send(self, value: Any) -> None:
    """Sends a pytree of NumPy arrays."""
    assert self.connection is not None
    self.connection.send(value)

  def take(self, key: Any) -> Any:
    """Waits for the next message, which is the one expected: orders are the same at both ends."""
    found, value = self.found.get()
    if found != key:
      raise RuntimeError(f'expected {key}, found {found}')
    return value


class Stage:
  """Compiled programs of a stage, its weights, and what it remembers."""

  def __init__(self, cut: tuple[int, int], counts: list[int], rows: int, tiny: bool):
    """Builds and compiles; the first call of each program is made here."""
    import jax
    import jax.numpy as jnp

    from experiments.pipeline_schedules import model

    self.jax = jax
    experiment = model.experiment(tiny)
    self.unit, self.parts, self.weights, given = model.stage(experiment, cut, counts, rows)
    self.data_of, x = given
    self.data = self.data_of[counts[0]]
    self.forward = jax.jit(self.parts.forward)
    self.backward_input = jax.jit(self.parts.backward_input)

    def weight(weights, data, left, sums):
      return jax.tree.map(jnp.add, sums, self.parts.backward_weight(weights, data, left))

    def backward(weights, data, kept, cotangent, sums):
      for_x, for_weights = self.parts.backward(weights, data, kept, cotangent)
      return for_x, jax.tree.map(jnp.add, sums, for_weights)

    self.backward_weight = jax.jit(weight, donate_argnums=3)
    self.backward = jax.jit(backward, donate_argnums=4)
    self.sums = jax.tree.map(jnp.zeros_like, self.weights)
    self.x = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), x)
    self.kept: dict[int, Any] = {}
    self.left: dict[int, Any] = {}

  def do(self, kind: str, microbatch: int, value: Any) -> Any:
    """Does a piece of work, waits for it, and returns what goes to a neighbour."""
    jax, result = self.jax, None
    data = self.data[microbatch]
    if kind == 'F':
      result, self.kept[microbatch] = self.forward(self.weights, value, data)
    elif kind == 'B':
      kept = self.kept.pop(microbatch)
      result, self.left[microbatch] = self.backward_input(self.weights, data, kept, value)
    elif kind == 'W':
      left = self.left.pop(microbatch)
      self.sums = self.backward_weight(self.weights, data, left, self.sums)
    else:
      kept = self.kept.pop(microbatch)
      result, self.sums = self.backward(self.weights, data, kept, value, self.sums)
    jax.block_until_ready((result, self.sums, self.left.get(microbatch), self.kept.get(microbatch)))
    return result

  def take_gradients(self) -> dict[str, Any]:
    """Returns the summed gradients as NumPy arrays, and begins anew."""
    found = self.jax.device_get(self.sums)
    self.sums = self.jax.tree.map(self.jax.numpy.zeros_like, self.weights)
    return found


def time_programs(stage: Stage, repeats: int) -> dict[str, float]:
  """Times every kind of work on the first microbatch: medians, in seconds."""
  import jax
  import jax.numpy as jnp

  taken: dict[str, list[float]] = {kind: [] for kind in ('F', 'B', 'W', 'BW')}
  for turn in range(repeats + 1):
    cotangent = None
    for kinds in (('F', 'B', 'W'), ('F', 'BW')):
      for kind in kinds:
        value = stage.x if kind == 'F' else cotangent
        begin = time.perf_counter()
        found = stage.do(kind, 0, value)
        # The first turn compiles.
        if turn:
          taken[kind].append(time.perf_counter() - begin)
        if kind == 'F':
          cotangent = jax.tree.map(jnp.ones_like, found)
  stage.take_gradients()
  return {kind: statistics.median(seconds) for kind, seconds in taken.items()}


def run_order(stage: Stage, order: list, chunk: int, last: int, inboxes: tuple) -> list:
  """Runs an order of work; returns (kind, microbatch, start, end) of every piece."""
  import jax
  import jax.numpy as jnp

  before, after = inboxes
  events = []
  for kind, _, microbatch in order:
    value: Any = None
    if kind == 'F':
      value = before.take(('F', microbatch)) if chunk else {}
    elif kind in ('B', 'BW'):
      value = after.take(('B', microbatch)) if chunk < last else jnp.float32(1)
    start = time.perf_counter()
    value = stage.do(kind, microbatch, value)
    events.append((kind, microbatch, start, time.perf_counter()))
    if kind == 'F' and chunk < last:
      after.send((('F', microbatch), jax.device_get(value)))
    elif kind in ('B', 'BW') and chunk:
      before.send((('B', microbatch), jax.device_get(value)))
  return events


def time_transfer(chunk: int, inboxes: tuple, like: Any, repeats: int) -> float:
  """Sends an array as large as activations to and fro; returns half of the median round trip."""
  import jax

  before, after = inboxes
  value, taken = jax.device_get(like), []
  for turn in range(repeats):
    begin = time.perf_counter()
    if chunk == 0:
      after.send((('ping', turn), value))
      after.take(('pong', turn))
    else:
      got = jax.device_put(before.take(('ping', turn)))
      before.send((('pong', turn), jax.device_get(got)))
    taken.append(time.perf_counter() - begin)
  return statistics.median(taken[1:]) / 2


def work(
  core: int,
  chunk: int,
  last: int,
  parent: Connection,
  neighbours: tuple[Connection | None, Connection | None],
) -> None:
  """Serves the parent until it says stop; `core` is where all of the process runs."""
  os.sched_setaffinity(0, {core})
  os.environ['XLA_FLAGS'] = FLAGS
  os.environ['JAX_PLATFORMS'] = 'cpu'
  inboxes = tuple(Inbox(connection) for connection in neighbours)
  stage = Stage(*parent.recv())
  parent.send('ready')
  while True:
    command, *arguments = parent.recv()
    if command == 'stop':
      return
    if command == 'time':
      parent.send(time_programs(stage, *arguments))
    elif command == 'transfer':
      parent.send(time_transfer(chunk, inboxes, arguments[0], arguments[1]))
    elif command == 'run':
      count, order = arguments
      stage.data = stage.data_of[count]
      parent.send(run_order(stage, order, chunk, last, inboxes))
    elif command == 'gradients':
      parent.send(stage.take_gradients())
