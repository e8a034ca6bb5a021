"""What processes tell one another beside their arrays: a decision, an error, that one is ready.

It goes through the coordinator that `processes.start` opened, not over the devices: it may take
hours, and needs no compiled program. Every process makes the same calls in the same order. Where
there is one process, each function does what it is given, and nothing else.
"""

import base64
import itertools
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

_POLL_MILLISECONDS = 1000
_numbers: Iterator[int] = itertools.count()
_lock = threading.Lock()


class PeerError(Exception):
  """Another process failed at what all were to do; its own log says at what."""


def alone() -> bool:
  """Whether there is one process; touches no device."""
  return not jax.distributed.is_initialized()


def first() -> bool:
  """Whether this is the process that prints and writes: the only one, or number 0 of several."""
  return alone() or jax.process_index() == 0


def from_first[T](make: Callable[[], T]) -> T:
  """Has the first process do something, and gives its result to all; or raises its error in all.

  Args:
    make: what only the first calls; what it returns must be picklable.
  """
  if alone():
    return make()
  key = _fresh_key()
  if first():
    try:
      value = make()
    except Exception as error:
      tell(f'{key}/result', (None, _portable(error)))
      raise
    tell(f'{key}/result', (value, None))
    return value
  found, failure = hear(f'{key}/result')
  if failure is not None:
    raise failure
  return found


def in_turn[T](make: Callable[[], T]) -> T:
  """Has the first process do something before the others do it: they find its files ready.

  Args:
    make: what every process calls.
  """
  if alone():
    return make()
  made: list[T] = []
  from_first(lambda: made.append(make()))
  return made[0] if made else make()


def gather[T](value: T) -> list[T]:
  """Returns the values of all processes, in their order; each must be picklable."""
  if alone():
    return [value]
  key = _fresh_key()
  tell(f'{key}/{jax.process_index()}', value)
  return [hear(f'{key}/{index}') for index in range(jax.process_count())]


def leave() -> None:
  """Waits until the other processes leave too, so that nobody takes anybody for dead."""
  if not alone():
    jax.distributed.shutdown()


def tell(key: str, value: Any) -> None:
  """Says something to whoever asks for the key, once."""
  _client().key_value_set(key, base64.b64encode(pickle.dumps(value)).decode('ascii'))


def hear(key: str) -> Any:
  """Waits until somebody has told the key; Python hears signals meanwhile."""
  while True:
    try:
      found = _client().blocking_key_value_get(key, _POLL_MILLISECONDS)
      return pickle.loads(base64.b64decode(found))
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise


def told(folder: str) -> dict[str, Any]:
  """Returns what has been told so far under keys that begin with `folder/`, without waiting."""
  pairs = _client().key_value_dir_get(f'{folder}/')
  return {key.removeprefix(f'{folder}/'): pickle.loads(base64.b64decode(v)) for key, v in pairs}


def fresh_folder() -> str:
  """Returns a name for keys, the same in all processes and not used before."""
  return _fresh_key()


def _fresh_key() -> str:
  with _lock:
    return f'deepseek_jax/{next(_numbers)}'


def _portable(error: Exception) -> Exception:
  """The error as another process can raise it."""
  try:
    pickle.loads(pickle.dumps(error))
    return error
  except Exception:
    return PeerError(f'{type(error).__name__}: {error}')


def _client() -> Any:
  # JAX has no public name for the store of its coordinator; Orbax takes it from here too.
  from jax._src import distributed

  return distributed.global_state.client
