"""Captions in files: beside each medium, or in tables of many."""

import csv
import dataclasses
import io
import json
import pathlib
import unicodedata
from typing import Any

from deepseek_jax.data.media.record import Fault, UnreadableError

SIDECARS = ('.txt', '.json')
TABLES = ('.jsonl', '.csv')
_FILE_KEYS = ('file', 'file_name', 'filename', 'path', 'image', 'video', 'sound', 'audio', 'points')
_CAPTION_KEYS = ('caption', 'text')


def checked(text: object, longest: int) -> str:
  """A caption without blanks around it.

  Raises:
    UnreadableError: it is no text, empty, or too long.
  """
  if not isinstance(text, str):
    raise UnreadableError(f'the caption is {type(text).__name__}, not text')
  if any('\ud800' <= letter <= '\udfff' for letter in text):
    raise UnreadableError('the caption is not UTF-8')
  text = text.replace('\0', '').strip()
  if not text:
    raise UnreadableError('the caption is empty')
  if len(text) > longest:
    raise UnreadableError(f'the caption has {len(text)} letters, more than {longest}')
  return text


def decoded(data: bytes) -> str:
  """UTF-8 as text; a byte order mark is left out.

  Raises:
    UnreadableError: it is not UTF-8.
  """
  try:
    return data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise UnreadableError(f'the caption is not UTF-8 (byte {error.start})') from error


def from_sidecar(name: str, data: bytes, longest: int) -> str:
  """The caption of a .txt or .json file that belongs to one medium.

  Raises:
    UnreadableError: it holds none.
  """
  text: Any = decoded(data)
  if name.endswith('.json'):
    try:
      record = json.loads(text)
    except ValueError as error:
      raise UnreadableError(f'the caption is not JSON: {error}') from error
    text = from_record(record)
  return checked(text, longest)


def from_record(record: object) -> object:
  """What a JSON object or a line of a table says is the caption.

  Raises:
    UnreadableError: it has no such field.
  """
  if not isinstance(record, dict):
    raise UnreadableError(f'no caption: found {type(record).__name__}, expected an object')
  for key in _CAPTION_KEYS:
    if record.get(key) is not None:
      return record[key]
  raise UnreadableError(f'no caption: no field {" or ".join(_CAPTION_KEYS)}')


@dataclasses.dataclass
class CaptionTable:
  """Captions by the path of the medium, from all tables of a folder.

  Attributes:
    root: the folder.
    longest: letters that a caption may have.
    captions: by path relative to the root, in one form of Unicode.
    broken: why the caption of a medium cannot be used, by the same path.
    faults: lines that belong to no medium.
  """

  root: pathlib.Path
  longest: int
  captions: dict[str, str] = dataclasses.field(default_factory=dict)
  broken: dict[str, str] = dataclasses.field(default_factory=dict)
  faults: list[Fault] = dataclasses.field(default_factory=list)

  def read(self, path: pathlib.Path) -> None:
    """Adds the lines of a table; what cannot be read is a fault, and the other lines count."""
    table = path.relative_to(self.root).as_posix()
    # Bytes that are no UTF-8 become lone surrogates, so that only their own lines are lost.
    text = path.read_bytes().decode('utf-8-sig', 'surrogateescape')
    if path.suffix.lower() == '.csv':
      reader = csv.DictReader(io.StringIO(text, newline=''))
      for record in reader:
        self._add(table, f'line {reader.line_num}', dict(record), path.parent)
      return
    for number, line in enumerate(text.split('\n'), 1):
      if not line.strip():
        continue
      try:
        record = json.loads(line)
      except ValueError as error:
        self.faults.append(Fault(name=f'{table} line {number}', reason=f'not JSON: {error}'))
        continue
      self._add(table, f'line {number}', record, path.parent)

  def _add(self, table: str, place: str, record: object, folder: pathlib.Path) -> None:
    """Adds one line."""
    where = f'{table} {place}'
    name = (
      next((record[key] for key in _FILE_KEYS if record.get(key)), None)
      if isinstance(record, dict)
      else None
    )
    if not isinstance(name, str):
      self.faults.append(Fault(name=where, reason='names no file'))
      return
    path = (folder / name).resolve()
    if not path.is_relative_to(self.root.resolve()):
      self.faults.append(Fault(name=where, reason=f'{name!r} is outside the folder'))
      return
    key = normal(path.relative_to(self.root.resolve()).as_posix())
    try:
      caption = checked(from_record(record), self.longest)
    except UnreadableError as error:
      self.broken.setdefault(key, f'{error} ({where})')
      return
    known = self.captions.setdefault(key, caption)
    if known != caption:
      self.broken.setdefault(key, f'two captions: {known!r} and {caption!r} ({where})')


def normal(name: str) -> str:
  """A name in one form of Unicode: systems differ in how they write letters with accents."""
  return unicodedata.normalize('NFC', name)
