"""The state a run begins with: new weights, another run's, or its own last checkpoint."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.serialise import from_json
from deepseek_jax.data.progress import say
from deepseek_jax.models.plan import Segment
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.checkpoint_reader import read_tree, saved_steps, whole_step
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.regroup import (
  Piece,
  Transfer,
  collapse,
  flat,
  load_pieces,
  match_pieces,
  pieces,
)
from deepseek_jax.train.replicas import refit_carry, saved_replicas
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.step import Program

_SHOWN = 12
_COLLECTIONS = ('params', 'buffers')


def read_segments(path: pathlib.Path) -> tuple[Segment, ...]:
  """Returns the scans that the arrays of a checkpoint were stacked for.

  Args:
    path: folder of the step.

  Raises:
    ConfigError: it holds no experiment.
  """
  config = Checkpoints(path.parent).read_config(int(path.name))
  try:
    found = from_json(config)
  except ConfigError as error:
    raise ConfigError(f'{path}: its config: {message}' for message in error.messages) from None
  if not isinstance(found, Experiment):
    raise ConfigError(f'{path}: its config is no Experiment but {type(found).__name__}')
  return found.segments


def resume_state(
  program: Program, checkpoints: Checkpoints, step: int, tell: Callable[[str], None] = say
) -> TrainState:
  """Reads a run's own checkpoint, as it was saved: other groups of layers, or other replicas.

  Args:
    program: the functions of the run.
    checkpoints: of the run.
    step: which one.
    tell: takes a line about what is not as it was.

  Raises:
    ConfigError: it cannot be read, or arrays are missing or differ.
  """
  wanted = program.abstract_state
  tree = read_tree(checkpoints.directory / str(step))
  found = saved_replicas(tree.get('carry', ()) if isinstance(tree, dict) else ())
  replicas = saved_replicas(wanted.carry)
  if found in (None, replicas) or replicas is None:
    return _resume(program, wanted, checkpoints, step)

  def before(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if not leaf.shape:
      return leaf
    lies = NamedSharding(program.mesh, PartitionSpec(None, *leaf.sharding.spec[1:]))
    return jax.ShapeDtypeStruct((found, *leaf.shape[1:]), leaf.dtype, sharding=lies)

  saved = dataclasses.replace(wanted, carry=jax.tree.map(before, wanted.carry))
  state = _resume(program, saved, checkpoints, step)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted.carry)
  refit = jax.jit(lambda carry: refit_carry(carry, replicas), out_shardings=shardings)
  tell(
    f'step {step} was saved by {found} replicas: {replicas} go on, each with its share of the '
    'errors and with the mean of the rest'
  )
  return dataclasses.replace(state, carry=refit(state.carry))


def _resume(
  program: Program, wanted: TrainState, checkpoints: Checkpoints, step: int
) -> TrainState:
  """Reads a checkpoint into the shapes and layouts of `wanted`."""
  path = checkpoints.directory / str(step)
  segments = program.experiment.segments
  saved = read_segments(path)
  if saved == segments:
    return checkpoints.restore(wanted, step).state
  target = pieces(flat(wanted), segments)
  transfer = match_pieces(pieces(flat(read_tree(path)), saved), target)
  faults = [f'{address}: found nothing' for address in collapse(transfer.fresh)]
  faults += [f'{address}: {words}' for address, words in transfer.different.items()]
  faults += [f'{address}: expected nothing' for address in collapse(transfer.unused)]
  if faults:
    raise ConfigError(
      [f'{path}: its arrays differ from those of this experiment', *faults[:_SHOWN]]
    )
  return load_pieces(path, transfer, wanted, target)


@dataclasses.dataclass(frozen=True)
class Origin:
  """A checkpoint that a new run begins with, compared with what the run needs.

  Attributes:
    path: folder of the step.
    transfer: what of it goes where.
    target: pieces of the run's parameters and buffers by canonical address.
  """

  path: pathlib.Path
  transfer: Transfer
  target: dict[str, Piece]

  def describe(self) -> str:
    """Returns what is loaded, what is new, what does not fit and what is left over, in lines."""
    found = self.transfer
    lines = [f'begins with {self.path}: {len(found.sources)} of {len(self.target)} arrays loaded']
    different = collapse(found.different)
    for title, names in (
      ('fresh', collapse(found.fresh)),
      ('fresh, of another shape there', different),
      ('unused', collapse(found.unused)),
    ):
      if names:
        lines.append(f'{title}: {", ".join(names)}')
    return '\n'.join(lines)

  def write(self, path: pathlib.Path) -> None:
    """Writes the same as JSON, every address in full."""
    found = self.transfer
    content = {
      'checkpoint': str(self.path),
      'loaded': list(found.sources),
      'fresh': list(found.fresh),
      'different': found.different,
      'unused': list(found.unused),
    }
    path.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')

  def load(self, program: Program, state: TrainState) -> TrainState:
    """Returns a fresh state with the weights of the checkpoint wherever they fit."""
    target = {name: getattr(program.abstract_state, name) for name in _COLLECTIONS}
    base = {name: getattr(state, name) for name in _COLLECTIONS}
    arrays = load_pieces(self.path, self.transfer, target, self.target, base)
    if jax.tree.leaves(state.ema):
      # The average begins where the weights do; the step gives both away, so they are two.
      state = dataclasses.replace(state, ema=jax.tree.map(jnp.copy, arrays['params']))
    return dataclasses.replace(state, **arrays)


def open_origin(program: Program) -> Origin | None:
  """Finds and compares the checkpoint of `init_from`; reads no array. None where there is none.

  Raises:
    ConfigError: there is no whole checkpoint there, it has not the weights asked for, or nothing
      of it fits.
  """
  wanted = program.experiment.init_from
  if wanted is None:
    return None
  path = find_checkpoint(wanted.path, wanted.step)
  tree = read_tree(path)
  if not isinstance(tree, dict) or 'params' not in tree:
    raise ConfigError(f'init_from: {path} holds no parameters')
  collection = _collection(tree, wanted.weights, path)
  arrays = {'params': tree[collection], 'buffers': tree.get('buffers', {})}
  renamed = {}
  for address, piece in pieces(flat(arrays), read_segments(path)).items():
    inside = piece.address
    if collection != 'params' and inside.startswith('params/'):
      inside = f'{collection}/{inside.removeprefix("params/")}'
    renamed[address] = dataclasses.replace(piece, address=inside)
  segments = program.experiment.segments
  target = pieces(
    flat({name: getattr(program.abstract_state, name) for name in _COLLECTIONS}), segments
  )
  transfer = match_pieces(renamed, target)
  if not any(address.startswith('params/') for address in transfer.sources):
    raise ConfigError(
      [
        f'init_from: nothing of {path} fits this model',
        *(f'{address}: {words}' for address, words in list(transfer.different.items())[:_SHOWN]),
      ]
    )
  return Origin(path, transfer, target)


def find_checkpoint(path: str, step: int | None) -> pathlib.Path:
  """Returns the folder of a whole checkpoint.

  Args:
    path: a workdir, its folder of checkpoints, or the folder of one step.
    step: which one; None is the newest that is whole.

  Raises:
    ConfigError: there is none.
  """
  folder = pathlib.Path(path).expanduser().absolute()
  if (folder / 'checkpoints').is_dir():
    folder /= 'checkpoints'
  elif folder.name.isdecimal() and (folder / 'state').is_dir():
    if step not in (None, int(folder.name)):
      raise ConfigError(f'init_from: {folder} is of step {folder.name}, not of step {step}')
    folder, step = folder.parent, int(folder.name)
  if not saved_steps(folder):
    raise ConfigError(
      f"init_from: {folder} holds no checkpoint; expected a run's workdir, its folder of "
      'checkpoints, or the folder of a step'
    )
  return folder / str(whole_step(folder, step))


def _collection(tree: Any, weights: Literal['raw', 'averaged'], path: pathlib.Path) -> str:
  if weights == 'raw':
    return 'params'
  if not flat({'ema': tree.get('ema', {})}):
    raise ConfigError(f'init_from: {path} has no averaged weights; ask for weights="raw"')
  return 'ema'
