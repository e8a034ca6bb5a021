"""A model as a folder that other programs read: weights, config, tokenizer, checksums."""

import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.convert.config_json import config_of
from deepseek_jax.convert.lazy import Index, Lazy, cast
from deepseek_jax.convert.names import names_of
from deepseek_jax.convert.published import AHEAD
from deepseek_jax.convert.safetensors import write_file, write_folder
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.tree import flatten
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.deepseek_v4 import DeepSeekV4
from deepseek_jax.models.plan import Segment, locate

SUMS = 'SHA256SUMS'
SOURCE = 'source.json'


class Files(NamedTuple):
  """What is going to be written.

  Attributes:
    weights: tensors that every program knows, by name.
    ahead: those of multi-token prediction, which go to a file of their own.
    texts: contents of the other files by name.
  """

  weights: dict[str, Lazy]
  ahead: dict[str, Lazy]
  texts: dict[str, str]


def plan_files(
  model: DeepSeekV3 | DeepSeekV4,
  parts: Mapping[str, Lazy],
  dtype: str,
  length: int,
  tokenizer: Tokenizer | None,
) -> Files:
  """Returns what a model's folder holds, under the hub's names; reads no weight.

  Buffers and vectors stay float32, as in the released files.

  Args:
    model: the config of the model.
    parts: its arrays by canonical address.
    dtype: of the matrices, 'float32' or 'bfloat16'.
    length: tokens of the longest row it was trained on.
    tokenizer: made the tokens it was trained on, or None.

  Raises:
    ConfigError: no published model has such parts.
  """
  config = config_of(model, length)
  config['dtype'] = dtype
  weights: dict[str, Lazy] = {}
  ahead: dict[str, Lazy] = {}
  for entry in names_of(model).entries:
    part = parts[entry.ours]
    if entry.ours.startswith('params/') and len(part.shape) > 1:
      part = cast(part, np.dtype(dtype))
    elif np.issubdtype(part.dtype, np.integer):
      part = cast(part, np.int64)
    group = ahead if entry.ours.split('/')[1].startswith('mtp_') else weights
    group |= zip(entry.theirs, entry.form.theirs(part), strict=True)
  texts = {}
  if tokenizer is not None:
    config |= {
      'bos_token_id': tokenizer.bos,
      'eos_token_id': tokenizer.eos,
      'pad_token_id': tokenizer.pad,
    }
    texts = tokenizer.files()
  texts['config.json'] = _json(config)
  return Files(weights, ahead, texts)


def write(
  folder: pathlib.Path, files: Files, source: Mapping[str, Any], largest: int = 5_000_000_000
) -> Iterator[str]:
  """Writes a folder; yields the name of each tensor as it is written.

  A file has its name when it is whole, and files that an earlier attempt has finished are kept.

  Args:
    folder: made if needed.
    files: from `plan_files`.
    source: what the weights are, as JSON: an attempt is only gone on with from the same.
    largest: bytes of one file of tensors.

  Raises:
    ConfigError: the folder holds something else.
  """
  folder.mkdir(parents=True, exist_ok=True)
  said = _json({**source, 'config': json.loads(files.texts['config.json'])})
  there = folder / SOURCE
  if there.is_file():
    if there.read_text(encoding='utf-8') != said:
      raise ConfigError(f'{folder}: holds another model, or a part of it; see {SOURCE}')
  elif any(folder.iterdir()):
    raise ConfigError(f'{folder}: is not empty; expected a new folder')
  there.write_text(said, encoding='utf-8')
  yield from write_folder(folder, files.weights, largest, keep=True)
  if files.ahead:
    yield from write_file(folder / AHEAD, files.ahead, keep=True)
  for name, text in files.texts.items():
    (folder / name).write_text(text, encoding='utf-8')
  # What an attempt that was killed has left begins with a dot.
  names = sorted(path.name for path in folder.iterdir() if path.name[0] != '.')
  names = [name for name in names if name != SUMS]
  lines = [f'{_digest(folder / name)}  {name}\n' for name in names]
  (folder / SUMS).write_text(''.join(lines), encoding='utf-8')


def digest_of_vectors(parts: Mapping[str, Lazy]) -> str:
  """Returns a checksum by which other weights of the same model are told apart at little cost.

  Of the arrays of one axis: norms and biases, which every training step moves.
  """
  digest = hashlib.sha256()
  for address in sorted(parts):
    if len(parts[address].shape) == 1:
      digest.update(parts[address].whole().tobytes())
  return digest.hexdigest()


def check_sums(folder: pathlib.Path) -> None:
  """Compares every file of a folder with its checksum; does nothing where there are none.

  Raises:
    ConfigError: with all files that are missing or have changed.
  """
  if not (folder / SUMS).is_file():
    return
  errors = []
  for line in (folder / SUMS).read_text(encoding='utf-8').splitlines():
    digest, _, name = line.partition('  ')
    if not (folder / name).is_file():
      errors.append(f'{folder / name}: is missing')
    elif _digest(folder / name) != digest:
      errors.append(f'{folder / name}: differs from its checksum in {SUMS}')
  if errors:
    raise ConfigError(errors)


def parts_of(
  variables: Mapping[str, Any], addresses: Sequence[str], segments: Sequence[Segment]
) -> dict[str, Lazy]:
  """Returns arrays that are on devices by canonical address; each is copied when it is read.

  Args:
    variables: of the model, grouped for its scans.
    addresses: of the arrays.
    segments: the scans.
  """
  flat = flatten(variables)

  def part(address: str) -> Lazy:
    home, repeat = locate(address, segments)
    array = flat[home]

    def read(index: Index) -> np.ndarray:
      return np.asarray(array[index if repeat is None else (repeat, *index)])

    shape = array.shape if repeat is None else array.shape[1:]
    return Lazy(tuple(shape), np.dtype(array.dtype), read)

  return {address: part(address) for address in addresses}


def _digest(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _json(value: Any) -> str:
  return json.dumps(value, indent=2, ensure_ascii=False) + '\n'
