"""Files of tensors in the safetensors layout, FP8 and its scales among them.

A file is the length of its header (eight bytes), the header (JSON: dtype, shape and place of every
tensor) and the tensors, one after the other. Files are mapped into memory, and nothing is read
before it is needed. The package `safetensors` cannot give its FP8 tensors to NumPy.
"""

import contextlib
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from deepseek_jax.convert.lazy import Lazy, stored
from deepseek_jax.core.config import ConfigError

INDEX = 'model.safetensors.index.json'
LARGEST_HEADER = 100_000_000
DTYPES = {
  'BOOL': np.dtype(np.bool_),
  'U8': np.dtype(np.uint8),
  'I8': np.dtype(np.int8),
  'I16': np.dtype(np.int16),
  'U16': np.dtype(np.uint16),
  'I32': np.dtype(np.int32),
  'U32': np.dtype(np.uint32),
  'I64': np.dtype(np.int64),
  'U64': np.dtype(np.uint64),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F32': np.dtype(np.float32),
  'F64': np.dtype(np.float64),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'F8_E8M0': np.dtype(ml_dtypes.float8_e8m0fnu),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 1 << 26
"""Bytes that are in memory at once when a tensor is written."""


def open_file(path: pathlib.Path) -> dict[str, Lazy]:
  """Returns the tensors of a file by name.

  Raises:
    ConfigError: there is no such file, it is cut off, or its header is not one.
  """
  header, start, size = _header(path)
  mapped = np.memmap(path, np.uint8, 'r')
  tensors = {}
  for name, entry in header.items():
    if name == '__metadata__':
      continue
    try:
      dtype, shape = DTYPES[entry['dtype']], tuple(int(n) for n in entry['shape'])
      begin, end = (int(n) for n in entry['data_offsets'])
    except (KeyError, TypeError, ValueError) as error:
      raise ConfigError(f'{path}: {name}: its entry {entry!r} is not one of a tensor') from error
    if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
      raise ConfigError(f'{path}: {name}: {end - begin} bytes for {entry["dtype"]} {list(shape)}')
    if start + end > size:
      raise ConfigError(
        f'{path}: {name} ends at byte {start + end:,}, and the file at {size:,}: it is cut off'
      )
    tensors[name] = stored(mapped[start + begin : start + end].view(dtype).reshape(shape))
  return tensors


def open_folder(folder: pathlib.Path) -> dict[str, Lazy]:
  """Returns the tensors of a folder by name: of the files of its index, or of `model.safetensors`.

  Where there is neither, all `*.safetensors` are taken.

  Raises:
    ConfigError: there is none, a file that the index names is missing or has not what it says, or
      two files have a tensor of one name.
  """
  index = folder / INDEX
  if index.is_file():
    return _indexed(folder, index)
  whole = folder / 'model.safetensors'
  files = [whole] if whole.is_file() else sorted(folder.glob('*.safetensors'))
  if not files:
    raise ConfigError(f'{folder}: holds no *.safetensors')
  found: dict[str, Lazy] = {}
  for file in files:
    tensors = open_file(file)
    if twice := sorted(found.keys() & tensors.keys()):
      raise ConfigError(f'{file}: {twice[0]} is in another file too, and there is no {INDEX}')
    found |= tensors
  return found


def write_folder(
  folder: pathlib.Path,
  tensors: Mapping[str, Lazy],
  largest: int = 5_000_000_000,
  keep: bool = False,
) -> Iterator[str]:
  """Writes tensors to one file, or to several with an index; yields each name as it is written.

  A file has its name when it is whole, and the index comes last.

  Args:
    folder: where; made if needed.
    tensors: by name, in the order of the files.
    largest: bytes of a file, unless one tensor has more.
    keep: files that are there and would have the same header are left as they are.
  """
  folder.mkdir(parents=True, exist_ok=True)
  groups: list[dict[str, Lazy]] = [{}]
  held = 0
  for name, tensor in tensors.items():
    if groups[-1] and held + tensor.bytes > largest:
      groups.append({})
      held = 0
    groups[-1][name] = tensor
    held += tensor.bytes
  single = len(groups) == 1
  weight_map: dict[str, str] = {}
  for number, group in enumerate(groups, start=1):
    file = 'model.safetensors' if single else f'model-{number:05}-of-{len(groups):05}.safetensors'
    yield from write_file(folder / file, group, keep)
    weight_map |= dict.fromkeys(group, file)
  if not single:
    total = sum(tensor.bytes for tensor in tensors.values())
    text = json.dumps({'metadata': {'total_size': total}, 'weight_map': weight_map}, indent=2)
    with _replacing(folder / INDEX) as out:
      out.write(text.encode('utf-8'))


def write_file(
  path: pathlib.Path, tensors: Mapping[str, Lazy], keep: bool = False
) -> Iterator[str]:
  """Writes tensors to a file, a piece at a time; yields each name as it is written.

  Args:
    path: of the file; it has its name when it is whole.
    tensors: by name.
    keep: a file that is there and would have the same header is left as it is.
  """
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name, tensor in tensors.items():
    begin, end = end, end + tensor.bytes
    kind = NAMES[tensor.dtype]
    header[name] = {'dtype': kind, 'shape': list(tensor.shape), 'data_offsets': [begin, end]}
  text = json.dumps(header, separators=(',', ':')).encode('utf-8')
  # Tensors begin at a multiple of eight bytes, as the format's own writer has it.
  text += b' ' * (-len(text) % 8)
  text = len(text).to_bytes(8, 'little') + text
  if keep and path.is_file() and path.stat().st_size == len(text) + end:
    with path.open('rb') as there:
      if there.read(len(text)) == text:
        yield from tensors
        return
  with _replacing(path) as file:
    file.write(text)
    for name, tensor in tensors.items():
      for piece in _pieces(tensor):
        file.write(piece.tobytes())
      yield name


class _Header(NamedTuple):
  entries: dict[str, Any]
  start: int
  size: int


def _header(path: pathlib.Path) -> _Header:
  try:
    size = path.stat().st_size
    with path.open('rb') as file:
      length = int.from_bytes(file.read(8), 'little')
      if size < 8 or length > min(size - 8, LARGEST_HEADER):
        raise ConfigError(
          f'{path}: its header would have {length:,} bytes, and the file has {size:,}; expected a '
          'safetensors file (a pointer of Git LFS has to be fetched first)'
        )
      entries = json.loads(file.read(length))
  except OSError as error:
    raise ConfigError(f'{path}: {error.strerror}') from error
  except ValueError as error:
    raise ConfigError(f'{path}: its header is no JSON: {error}') from error
  if not isinstance(entries, dict):
    raise ConfigError(f'{path}: its header is {type(entries).__name__}; expected an object')
  return _Header(entries, 8 + length, size)


def _indexed(folder: pathlib.Path, index: pathlib.Path) -> dict[str, Lazy]:
  try:
    weight_map = json.loads(index.read_text(encoding='utf-8'))['weight_map']
    names = sorted(set(weight_map.values()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ConfigError(f'{index}: expected an object with a `weight_map`') from error
  missing = [name for name in names if not (folder / name).is_file()]
  if missing:
    more = f' and {len(missing) - 1} more' if len(missing) > 1 else ''
    raise ConfigError(f'{folder}: {missing[0]}{more} of {INDEX} is not there')
  files = {name: open_file(folder / name) for name in names}
  absent = [name for name, file in weight_map.items() if name not in files[file]]
  if absent:
    raise ConfigError(
      f'{folder}: {len(absent)} of {len(weight_map)} tensors of {INDEX} are not in their files, '
      f'the first {absent[0]} in {weight_map[absent[0]]}'
    )
  return {name: files[file][name] for name, file in weight_map.items()}


def _pieces(tensor: Lazy) -> Iterator[np.ndarray]:
  """Reads a tensor in order, some rows at a time."""
  if not tensor.shape or tensor.bytes <= PIECE:
    yield tensor.whole()
    return
  rows = max(PIECE * tensor.shape[0] // tensor.bytes, 1)
  for start in range(0, tensor.shape[0], rows):
    yield tensor[start : start + rows]


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[IO[bytes]]:
  """Opens a file that has its name when it is whole, and is gone if that fails."""
  with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f'.{path.name}.', delete=False) as file:
    try:
      yield file
    except BaseException:
      os.unlink(file.name)
      raise
  os.replace(file.name, path)
