"""Captioned drawings that ship in the package, and how they are read."""

import dataclasses
import hashlib
import io
import json
import lzma
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.source import Split

IMAGES_FOLDER = pathlib.Path(__file__).parent / 'images'
CONTAINER, INDEX = 'openclipart.webp.bin', 'openclipart.jsonl.xz'

SIDE = 64
"""Pixels S of a side of the drawings in the package."""

FOLDERS = (
  'animals buildings buttons computer containers decorations education electronics food geography '
  'logos office people plants recreation science shapes signs_and_symbols special tools '
  'transportation unsorted'
).split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenClipart:
  """Public-domain drawings of 64 × 64 pixels with captions; the split is fixed, by drawing.

  Attributes:
    folders: which of the collection's folders to read; empty takes all.
  """

  folders: tuple[str, ...] = ()

  def __post_init__(self):
    """Refuses unknown folders."""
    unknown = [folder for folder in self.folders if folder not in FOLDERS]
    if unknown:
      raise ConfigError(
        f'OpenClipart.folders: expected some of {", ".join(FOLDERS)}; found {unknown}'
      )

  @property
  def side(self) -> int:
    """Pixels S of a side of a picture."""
    return SIDE

  def records(self, split: Split) -> list[dict[str, Any]]:
    """The records of a split, in order of paths: `name`, `caption`, `keywords` and more."""
    chosen = [record for record in read_records(IMAGES_FOLDER) if record['split'] == split]
    if self.folders:
      chosen = [r for r in chosen if r['name'].split('/')[0] in self.folders]
    return chosen

  def pictures(self, records: Sequence[dict[str, Any]]) -> np.ndarray:
    """The pictures [n, S, S, 3] uint8 of some records.

    Raises:
      ConfigError: one cannot be read; says which.
    """
    return read_pictures(IMAGES_FOLDER, records)

  def packed(self, record: dict[str, Any]) -> bytes:
    """The WebP file of a record's picture."""
    with (IMAGES_FOLDER / CONTAINER).open('rb') as stream:
      stream.seek(record['start'])
      return stream.read(record['bytes'])

  def fingerprint(self) -> str:
    """Hexadecimal hash of the files and of what is taken from them."""
    digest = hashlib.sha256(f'openclipart 1 {self.folders}'.encode())
    for name in (CONTAINER, INDEX):
      digest.update(hashlib.sha256((IMAGES_FOLDER / name).read_bytes()).digest())
    return digest.hexdigest()


def read_records(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The index of a container: a record a picture, with `start`, where its bytes begin.

  Raises:
    ConfigError: the index is damaged.
  """
  path = folder / INDEX
  try:
    lines = lzma.decompress(path.read_bytes()).decode('utf-8').splitlines()
    records = [json.loads(line) for line in lines]
    start = 0
    for record in records:
      record['start'] = start
      start += record['bytes']
  except (lzma.LZMAError, EOFError, ValueError, KeyError) as error:
    raise ConfigError(f'{path}: the index of the drawings is damaged: {error}') from error
  return records


def read_pictures(folder: pathlib.Path, records: Sequence[dict[str, Any]]) -> np.ndarray:
  """Unpacks pictures [n, S, S, 3] uint8.

  Args:
    folder: of the container.
    records: from `read_records`.

  Raises:
    ConfigError: pictures are cut, changed, or of another size; each is named.
  """
  path = folder / CONTAINER
  content = path.read_bytes()
  pictures = np.zeros((len(records), SIDE, SIDE, 3), np.uint8)
  faults = []
  for place, record in enumerate(records):
    blob = content[record['start'] : record['start'] + record['bytes']]
    if len(blob) < record['bytes'] or zlib.crc32(blob) != record['crc32']:
      faults.append(f'{path}: the picture of {record["name"]} is damaged')
      continue
    try:
      pictures[place] = _decode(blob)
    except (OSError, ValueError) as error:
      faults.append(f'{path}: the picture of {record["name"]} cannot be decoded: {error}')
  if faults:
    more = [f'… and {len(faults) - 8} more'] if len(faults) > 8 else []
    raise ConfigError(faults[:8] + more)
  return pictures


def _decode(blob: bytes) -> np.ndarray:
  """A WebP file as [S, S, 3] uint8."""
  from PIL import Image  # here, because only pictures need it

  with Image.open(io.BytesIO(blob), formats=['WEBP']) as image:
    pixels = np.asarray(image.convert('RGB'))
  if pixels.shape != (SIDE, SIDE, 3):
    raise ValueError(
      f'found {pixels.shape[1]} × {pixels.shape[0]} pixels, expected {SIDE} × {SIDE}'
    )
  return pixels
