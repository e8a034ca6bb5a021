"""Checkpoints of a training run: whole or absent, written in the background, kept by rank.

Orbax writes a checkpoint under a temporary name and renames it when the last byte is on disk, so
that a killed run leaves either the whole checkpoint or none.
"""

import contextlib
import dataclasses
import json
import logging
import math
import pathlib
import shutil
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from orbax.checkpoint import v1 as ocp

from deepseek_jax.core.config import ConfigError
from deepseek_jax.sharding.agreement import from_first
from deepseek_jax.train.checkpoint_reader import (
  Json,
  PyTree,
  choose_step,
  context,
  finished_steps,
  place,
  read_tree,
  reading,
  require_equal_trees,
  restore_params,
  silence,
  whole_step,
)
from deepseek_jax.train.disk import free_bytes, full, is_full, needed_bytes

__all__ = ['Checkpoints', 'Restored', 'restore_params']


@dataclasses.dataclass(frozen=True)
class Restored:
  """What `Checkpoints.restore` brings back.

  Attributes:
    step: the number of finished steps.
    state: the pytree of arrays, placed as the abstract state asked.
    data_state: the JSON object that says where the data stood.
    config: the JSON object that describes the run.
  """

  step: int
  state: PyTree
  data_state: Json
  config: Json


class Checkpoints:
  """The checkpoints of one run: the `keep` newest, and the best by one metric.

  Reading never changes the directory: another process may read a run that is being trained. The
  first `save` makes the directory and removes what a killed save left behind. Not thread-safe.

  Attributes:
    directory: where the checkpoints are; absolute.
    keep: how many of the newest are preserved.
    best_metric: the metric whose smallest finite value marks the checkpoint that is preserved
      beside the newest; None preserves the newest only.
  """

  def __init__(self, directory: str | pathlib.Path, keep: int = 3, best_metric: str | None = None):
    """Remembers the settings; touches neither disk nor device.

    Args:
      directory: where the checkpoints are or will be; a relative path is made absolute.
      keep: how many of the newest checkpoints to preserve, at least 1.
      best_metric: key of the `metrics` given to `save`, such as 'bits_per_byte'; lower is better.

    Raises:
      ConfigError: if `keep` is less than 1.
    """
    if keep < 1:
      raise ConfigError(f'Checkpoints.keep: expected at least 1, found {keep}')
    self.directory = pathlib.Path(directory).expanduser().absolute()
    self.keep = keep
    self.best_metric = best_metric
    self._writer: ocp.training.Checkpointer | None = None
    self._pending: tuple[int, ocp.AsyncResponse[bool]] | None = None
    self._bytes = 0
    self._quiet = contextlib.ExitStack()

  def __enter__(self) -> 'Checkpoints':
    """Returns itself."""
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    """Waits for the pending save, then closes."""
    self.close()

  def __contains__(self, step: object) -> bool:
    """Whether the step is saved or is being saved."""
    return step in self.steps() or (self._pending is not None and self._pending[0] == step)

  def steps(self) -> tuple[int, ...]:
    """The steps with a whole checkpoint on disk, ascending."""
    return finished_steps(self.directory)

  def latest(self) -> int | None:
    """The newest step with a whole checkpoint on disk; None if there is none."""
    return max(self.steps(), default=None)

  def best(self) -> int | None:
    """The step with the smallest finite `best_metric`, the newest of equals; or None."""
    values = {step: self._value(self.read_metrics(step)) for step in self.steps()}
    finite = {step: value for step, value in values.items() if math.isfinite(value)}
    return min(finite, key=lambda step: (finite[step], -step), default=None)

  @property
  def saving(self) -> bool:
    """Whether a save has begun that nobody has waited for."""
    return self._pending is not None

  def save(
    self,
    step: int,
    state: PyTree,
    data_state: Json,
    config: Json,
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts writing a checkpoint and returns as soon as the state may be donated or changed.

    The state is held on the host when this returns; files are written by a background thread. A
    save that is still being written is waited for first, and its failure is raised here.

    Args:
      step: the number of finished steps.
      state: pytree of jax arrays; sub-trees may be empty.
      data_state: JSON object, such as {'step': 120}.
      config: JSON object that describes the run.
      metrics: scalars that rank the checkpoints.

    Raises:
      ConfigError: if the step is already saved (a checkpoint is never overwritten), or if
        `data_state` or `config` is not a JSON object.
      DiskFullError: if there is no room for the state; nothing has been written.
    """
    self.wait()
    if step in self:
      raise ConfigError(
        f'{self.directory / str(step)} exists already: a checkpoint is never overwritten'
      )
    _require_json(data_state=data_state, config=config)
    needed = needed_bytes(state)
    # Of several processes either all begin to save or none.
    from_first(lambda: self._require_room(step, needed))
    self._bytes = needed
    scores = {name: float(value) for name, value in (metrics or {}).items()}
    response = self._open_writer().save_checkpointables_async(
      step,
      {'state': state, 'data_state': data_state, 'config': config},
      # Asked for by the loop: saved even when it is older than one that is there.
      force=True,
      metrics=scores or None,
    )
    if response is None:
      raise RuntimeError(f'the checkpoint of step {step} was refused')
    self._pending = (step, response)

  def restore(self, abstract_state: PyTree, step: int | None = None) -> Restored:
    """Reads a checkpoint into the shapes and placements of `abstract_state`.

    Args:
      abstract_state: pytree like the saved state whose leaves are `jax.ShapeDtypeStruct`; each
        array is read straight into the leaf's `.sharding`, which need not be the one it was saved
        with. A leaf without a sharding goes to the first device.
      step: which checkpoint, read as it is on disk; None is the newest that is whole.

    Returns:
      The state and what was saved beside it.

    Raises:
      ConfigError: if there is no such checkpoint, if it cannot be read, or if its tree, shapes or
        dtypes differ from `abstract_state`: the first differing addresses are listed.
    """
    choose = whole_step if step is None else choose_step
    step = choose(self.directory, step)
    path = self.directory / str(step)
    require_equal_trees(path, read_tree(path), abstract_state)
    with reading(path), context():
      parts = ocp.load_checkpointables(
        path, {'state': place(abstract_state), 'data_state': None, 'config': None}
      )
    return Restored(step, parts['state'], parts['data_state'], parts['config'])

  def read_config(self, step: int | None = None) -> Json:
    """Reads the config of a checkpoint without reading an array.

    Args:
      step: which checkpoint; None is the newest.

    Returns:
      The JSON object that was given to `save`.

    Raises:
      ConfigError: if there is no such checkpoint or it cannot be read.
    """
    path = self.directory / str(choose_step(self.directory, step))
    with reading(path), context():
      return ocp.load_checkpointables(path, {'config': None})['config']

  def read_metrics(self, step: int | None = None) -> dict[str, float]:
    """Reads the metrics of a checkpoint; empty if it was saved without any.

    Args:
      step: which checkpoint; None is the newest.

    Returns:
      The scalars that were given to `save`.

    Raises:
      ConfigError: if there is no such checkpoint or it cannot be read.
    """
    path = self.directory / str(choose_step(self.directory, step))
    if not (path / 'metrics').is_dir():
      return {}
    # Orbax writes the metrics but reads them only for its own ranking: the name is reserved.
    with reading(path):
      return json.loads((path / 'metrics' / 'metrics').read_text())

  def wait(self) -> None:
    """Waits until the pending save is on disk; raises what went wrong with it.

    Raises:
      DiskFullError: if there was no room for all of it; what was written of it is removed.
    """
    if self._pending is None:
      return
    step, response = self._pending
    self._pending = None
    try:
      # Asking for the result also ends the thread that Orbax starts for each response.
      response.result()
    except Exception as error:
      self._abandon(step)
      if not is_full(error):
        raise
      raise full(self.directory, f'the checkpoint of step {step}', self._bytes) from error

  def _require_room(self, step: int, needed: int) -> None:
    """Refuses to save what will not fit."""
    if free_bytes(self.directory) < needed:
      raise full(self.directory, f'the checkpoint of step {step}', needed)

  def _abandon(self, step: int) -> None:
    """Removes what a failed save has written, and the writer that has failed."""
    writer, self._writer = self._writer, None
    if writer is not None:
      with contextlib.suppress(Exception):
        writer.close()
    for path in self.directory.glob(f'{step}.*tmp*'):
      shutil.rmtree(path, ignore_errors=True)

  def close(self) -> None:
    """Waits for the pending save and releases the writer; the object can still read."""
    try:
      self.wait()
    finally:
      writer, self._writer = self._writer, None
      if writer is not None:
        writer.close()
      self._quiet.close()

  def _value(self, metrics: Mapping[str, float] | None) -> float:
    """The rank of a checkpoint: its metric, or +inf where that is absent or not finite."""
    if self.best_metric is None:
      return math.inf
    value = (metrics or {}).get(self.best_metric, math.inf)
    return value if math.isfinite(value) else math.inf

  def _open_writer(self) -> ocp.training.Checkpointer:
    """The Orbax checkpointer, made at the first save."""
    if self._writer is None:
      # What fails is raised by `wait`, in our words.
      self._quiet.enter_context(silence(logging.CRITICAL))
      policies = ocp.training.preservation_policies
      preserved: list[Any] = [policies.LatestN(self.keep)]
      if self.best_metric is not None:
        preserved.append(
          policies.BestN(
            get_metric_fn=self._value, reverse=True, n=1, keep_checkpoints_without_metrics=False
          )
        )
      self._writer = ocp.training.Checkpointer(
        self.directory,
        context=context(),
        preservation_policy=policies.AnyPreservationPolicy(preserved),
        cleanup_tmp_directories=True,
      )
    return self._writer


def _require_json(**parts: Any) -> None:
  """Refuses what JSON would not give back unchanged."""
  for name, value in parts.items():
    try:
      same = isinstance(value, dict) and json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
      same = False
    if not same:
      raise ConfigError(
        f'{name}: expected a JSON object (a dict of str, numbers, lists, dicts, None), '
        f'found {type(value).__name__}: {str(value)[:80]}'
      )
