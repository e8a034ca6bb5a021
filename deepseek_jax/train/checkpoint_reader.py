"""Reads checkpoints: which are whole, whether one fits, and the weights alone for inference.

A checkpoint is one directory `<directory>/<step>` that holds four parts: `state` (the arrays),
`data_state` (where the data stood), `config` (what the run was) and `metrics` (what it had
reached). Nothing here changes a directory: a run may be read while it is being trained.
"""

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.progress import say
from deepseek_jax.train.seal import MARKERS, SealedJson, SealedTree, find_damage

Json = dict[str, Any]
PyTree = Any

_READ_ERRORS = (OSError, ValueError, KeyError, TypeError)
_SHOWN_DIFFERENCES = 8


Weights = Literal['averaged', 'raw']
"""Which weights of a run: the averaged ones (`Experiment.ema`), or those of the last step."""


def restore_params(
  directory: str | pathlib.Path, step: int | None = None, weights: Weights | None = None
) -> tuple[PyTree, PyTree, Json]:
  """Reads what inference needs from a checkpoint: weights and buffers, not the optimiser's state.

  Args:
    directory: the directory of the checkpoints (the parent of the step's directory).
    step: which checkpoint; None is the newest that is whole.
    weights: which of them; None is the averaged ones where the run keeps any.

  Returns:
    The parameters and the buffers as nested dicts of NumPy arrays in their saved dtypes, and the
    config as a JSON object.

  Raises:
    ConfigError: if there is no such checkpoint, it has no `params`, it is damaged or it cannot be
      read.
  """
  directory = pathlib.Path(directory).expanduser().absolute()
  return read_params(directory / str(whole_step(directory, step)), weights)


def read_params(path: pathlib.Path, weights: Weights | None = None) -> tuple[PyTree, PyTree, Json]:
  """Reads weights and buffers of a checkpoint as they are on disk; see `restore_params`.

  Args:
    path: the directory of a step that `whole_step` chose.
    weights: which of them; None is the averaged ones where the run keeps any.

  Raises:
    ConfigError: if it has no `params` or cannot be read.
  """
  found = read_tree(path)
  if not isinstance(found, dict) or not {'params', 'buffers'} <= set(found):
    names = sorted(found) if isinstance(found, dict) else type(found).__name__
    raise ConfigError(f'{path}: expected a state with params and buffers, found {names}')
  name = _weights_name(path, found, weights)
  wanted = jax.tree.map(
    lambda leaf: _NumpyLeaf(tuple(leaf.shape), np.dtype(leaf.dtype)),
    {name: found[name], 'buffers': found['buffers']},
  )
  partial = context()
  partial.pytree.loading.partial_load = True
  with reading(path), partial:
    parts = ocp.load_checkpointables(path.absolute(), {'state': wanted, 'config': None})
  return parts['state'][name], parts['state']['buffers'], parts['config']


def _weights_name(path: pathlib.Path, found: PyTree, weights: Weights | None) -> str:
  """The part of a saved state that holds the wanted weights."""
  averaged = bool(jax.tree.leaves(found.get('ema')))
  if weights == 'averaged' and not averaged:
    raise ConfigError(f'{path}: holds no averaged weights: the run was trained without `ema`')
  return 'ema' if averaged and weights != 'raw' else 'params'


@dataclasses.dataclass(frozen=True)
class _NumpyLeaf:
  """An abstract leaf without a sharding, which Orbax restores as a NumPy array."""

  shape: tuple[int, ...]
  dtype: np.dtype


class _DropOrbaxChatter(logging.Filter):
  """Drops Orbax's records below a level; lets every other record through."""

  def __init__(self, level: int):
    """Remembers the level.

    Args:
      level: the lowest one that is kept.
    """
    super().__init__()
    self._level = level

  def filter(self, record: logging.LogRecord) -> bool:
    """Whether the record is kept."""
    return record.levelno >= self._level or 'orbax' not in pathlib.Path(record.pathname).parts


@contextlib.contextmanager
def silence(level: int = logging.WARNING) -> Iterator[None]:
  """Silences Orbax below a level for a while, on every thread, and nothing else."""
  logger, chatter = logging.getLogger('absl'), _DropOrbaxChatter(level)
  logger.addFilter(chatter)
  try:
    yield
  finally:
    logger.removeFilter(chatter)


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
  """Turns what Orbax raises for a damaged checkpoint into one clear error."""
  # Its warnings are about what fails next, and that is raised.
  with silence(logging.ERROR):
    try:
      yield
    except ConfigError:
      raise
    except _READ_ERRORS as error:
      reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
      raise ConfigError(f'{path}: the checkpoint cannot be read: {reason}') from error


def context() -> ocp.Context:
  """Orbax's settings: how the parts are written, and no compression."""
  registry = ocp.handlers.local_registry(include_global_registry=False)
  for kind, known in ocp.handlers.global_registry().get_all_entries():
    if known != 'state':
      registry.add(kind, checkpointable_name=known)
  registry.add(SealedTree, checkpointable_name='state')
  for name in ('data_state', 'config'):
    registry.add(SealedJson, checkpointable_name=name)
  settings = ocp.Context()
  settings.checkpointables.registry = registry
  # Trained floats hardly compress, and on a CPU the compressor takes cores from the training step.
  settings.array.saving.use_compression = False
  return settings


def saved_steps(directory: pathlib.Path) -> tuple[int, ...]:
  """Steps whose directory has its final name, whole or not, ascending."""
  if not directory.is_dir():
    return ()
  return tuple(sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal()))


def finished_steps(directory: pathlib.Path) -> tuple[int, ...]:
  """Steps whose directory has its final name and every marker of a finished save, ascending."""
  return tuple(
    step
    for step in saved_steps(directory)
    if all((directory / str(step) / name).exists() for name in MARKERS)
  )


def choose_step(directory: pathlib.Path, step: int | None) -> int:
  """The wanted step, or the newest, known to be on disk; see `whole_step` for known to be whole."""
  if not directory.is_dir():
    raise ConfigError(f'{directory}: no such directory: expected one that holds checkpoints')
  steps = finished_steps(directory)
  if not steps:
    raise ConfigError(f'{directory}: holds no finished checkpoint')
  if step is None:
    return steps[-1]
  if step not in steps:
    raise ConfigError(
      f'{directory}: no checkpoint of step {step}; there are {", ".join(map(str, steps))}'
    )
  return step


def whole_step(directory: pathlib.Path, step: int | None) -> int:
  """The wanted step, or the newest whose every byte is as it was written.

  Newer ones that are damaged are told of on standard error.

  Args:
    directory: the directory of the checkpoints.
    step: which checkpoint; None is the newest whole one.

  Raises:
    ConfigError: there is no such checkpoint, or it is damaged, or all are.
  """
  if step is not None:
    fault = find_damage(directory / str(choose_step(directory, step)))
    if fault is not None:
      raise ConfigError(f'{directory / str(step)}: the checkpoint is damaged: {fault}')
    return step
  faults: list[str] = []
  for number in reversed(saved_steps(directory)):
    fault = find_damage(directory / str(number))
    if fault is None:
      if faults:
        say('\n'.join((*faults, f'using the checkpoint of step {number}')))
      return number
    faults.append(f'{directory / str(number)}: the checkpoint is damaged: {fault}')
  if faults:
    raise ConfigError([*faults, f'{directory}: no other checkpoint is left'])
  return choose_step(directory, None)


def read_tree(path: pathlib.Path) -> PyTree:
  """The tree of a saved state: shapes and dtypes, no arrays."""
  with reading(path), context():
    # Of a relative path Orbax finds nothing, and does not say so.
    tree = ocp.metadata(path.absolute(), 'state').metadata
    if tree is None:
      raise ValueError('its index of arrays is damaged')
  return tree


def place(abstract_state: PyTree) -> PyTree:
  """The abstract state with a sharding on every leaf."""
  first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or first),
    abstract_state,
  )


def address_of(path: tuple[Any, ...]) -> str:
  """A leaf's place, the same for a field, a key or an index: `opt_state/0/mu/embed`."""
  parts = (getattr(key, 'name', getattr(key, 'key', getattr(key, 'idx', key))) for key in path)
  return '/'.join(map(str, parts))


def _describe(tree: PyTree) -> dict[str, str]:
  """Address → `float32[4, 8]` of every leaf."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    address_of(path): f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}' for path, leaf in leaves
  }


def require_equal_trees(path: pathlib.Path, found: PyTree, expected: PyTree) -> None:
  """Raises with the first addresses at which a checkpoint differs from what is wanted."""
  have, want = _describe(found), _describe(expected)
  addresses = [*want, *(address for address in have if address not in want)]
  differing = [address for address in addresses if have.get(address) != want.get(address)]
  if not differing:
    return
  messages = [
    f'{path}: {len(differing)} of {len(addresses)} arrays differ from those of this experiment'
  ]
  messages += [
    f'{address}: found {have.get(address, "nothing")}, expected {want.get(address, "nothing")}'
    for address in differing[:_SHOWN_DIFFERENCES]
  ]
  if len(differing) > _SHOWN_DIFFERENCES:
    messages.append(f'… and {len(differing) - _SHOWN_DIFFERENCES} more')
  raise ConfigError(messages)
