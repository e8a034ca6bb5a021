"""The tensors of a published folder as plain numbers: scales multiplied in, experts one by one."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from deepseek_jax.convert.forms import only
from deepseek_jax.convert.lazy import Lazy, part_of, scaled_fours, scaled_tiles
from deepseek_jax.convert.safetensors import open_file, open_folder
from deepseek_jax.core.config import ConfigError
from deepseek_jax.formats import float4

AHEAD = 'ahead.safetensors'
"""File of the weights of multi-token prediction, which other programs would not know."""
TILE = (128, 128)
PACKED = re.compile(r'(.*\.experts)\.(gate_up_proj|down_proj)$')


def open_published(folder: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Lazy]:
  """Returns every tensor of a folder by name, none of them read yet.

  Numbers of eight and four bits are those that they stand for, float32, under the name of the
  weight; experts that lie in one tensor are given as the published files name them.

  Args:
    folder: that holds `*.safetensors`.
    config: of the model; its `quantization_config` says how large the tiles of a scale are.

  Raises:
    ConfigError: a file is missing or damaged, or a scale is missing or of a wrong shape.
  """
  tensors = open_folder(folder)
  if (folder / AHEAD).is_file():
    tensors |= open_file(folder / AHEAD)
  quantised = config.get('quantization_config') or {}
  rows, columns = quantised.get('weight_block_size') or TILE
  return unpacked(dequantised(tensors, (int(rows), int(columns))))


def dequantised(tensors: Mapping[str, Lazy], tile: tuple[int, int] = TILE) -> dict[str, Lazy]:
  """Returns the tensors with their scales multiplied in.

  The scales of `x.weight` are called `x.weight_scale_inv` (V3) or `x.scale` (V4).

  Args:
    tensors: by name.
    tile: rows and columns of an FP8 weight that share a scale.

  Raises:
    ConfigError: with every scale that is missing or does not fit.
  """
  scales = {}
  for name in tensors:
    if name.endswith('.weight_scale_inv'):
      scales[name.removesuffix('_scale_inv')] = name
    elif name.endswith('.scale') and (weight := f'{name.removesuffix(".scale")}.weight') in tensors:
      scales[weight] = name
  result, errors = {}, []
  unused = set(scales.values())
  for name, tensor in tensors.items():
    if name in unused:
      continue
    eight = tensor.dtype.name.startswith('float8')
    if name not in scales:
      if eight:
        errors.append(f'{name}: is {tensor.dtype.name} and has no scales')
      result[name] = tensor
      continue
    scale = tensors[scales[name]]
    try:
      if eight:
        result[name] = scaled_tiles(tensor, scale, tile)
      elif tensor.dtype.name in ('int8', 'uint8') and len(tensor.shape) == 2:
        result[name] = scaled_fours(tensor, scale)
      else:
        errors.append(
          f'{name}: has scales, and is {tensor.dtype.name}; expected float8 of tiles {list(tile)} '
          f'or bytes of two four-bit numbers in blocks of {float4.BLOCK}'
        )
    except ValueError as error:
      errors.append(f'{scales[name]}: {error}')
  if errors:
    raise ConfigError(errors)
  return result


def unpacked(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
  """Returns the tensors with those of all experts [E, …] as one for each expert and matrix."""
  result = {}
  for name, tensor in tensors.items():
    found = PACKED.match(name)
    if found is None or len(tensor.shape) != 3:
      result[name] = tensor
      continue
    prefix, kind = found.groups()
    for expert in range(tensor.shape[0]):
      own = only(tensor, expert)
      if kind == 'down_proj':
        result[f'{prefix}.{expert}.down_proj.weight'] = own
        continue
      half = own.shape[0] // 2
      result[f'{prefix}.{expert}.gate_proj.weight'] = part_of(own, 0, 0, half)
      result[f'{prefix}.{expert}.up_proj.weight'] = part_of(own, 0, half, own.shape[0])
  return result
