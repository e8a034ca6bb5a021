"""Reads .txt and .jsonl files, plain or compressed, and says precisely what is wrong with one."""

import difflib
import glob
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.document import Document
from deepseek_jax.data.unpack import PACKINGS, unpacked

_KINDS = ('.txt', '.jsonl')


def matches(pattern: str) -> list[pathlib.Path]:
  """The files a glob pattern names, sorted.

  Raises:
    ConfigError: nothing matches; shows the pattern and what is near.
  """
  paths = [pathlib.Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
  files = [path for path in paths if path.is_file()]
  if not files:
    raise ConfigError(f'TextFiles.pattern: no file matches {pattern!r}{_near(pattern, paths)}')
  wrong = [str(path) for path in files if _kind(path) is None]
  if wrong:
    raise ConfigError(
      f'TextFiles.pattern: {pattern!r} matches {wrong[0]!r}'
      + (f' and {len(wrong) - 1} more' if wrong[1:] else '')
      + '; expected names ending in .txt or .jsonl, plain or with .gz, .xz or .zst'
    )
  return files


def _near(pattern: str, paths: list[pathlib.Path]) -> str:
  """A hint: the deepest existing folder on the way and what is in it."""
  if pattern.startswith('~'):
    return '; ~ is not expanded here, write the whole path'
  if paths:
    return f'; {str(paths[0])!r} is a folder: did you mean {str(paths[0] / "**" / "*.txt")!r}?'
  folder = pathlib.Path(pattern).parent
  while glob.has_magic(str(folder)) or not folder.is_dir():
    folder = folder.parent
  names = sorted(entry.name + '/' * entry.is_dir() for entry in folder.iterdir())
  close = difflib.get_close_matches(pathlib.Path(pattern).name, names, n=3)
  shown = ', '.join(names[:8]) + (', …' if names[8:] else '') if names else 'nothing'
  hint = f'; did you mean {", ".join(close)}?' if close else ''
  return f'; {folder.resolve()} holds {shown}{hint}'


def _kind(path: pathlib.Path) -> str | None:
  """'.txt' or '.jsonl', whatever the packing; None for other names."""
  name = path.name.lower()
  for packing in PACKINGS:
    name = name.removesuffix(packing)
  return next((kind for kind in _KINDS if name.endswith(kind)), None)


def documents(path: pathlib.Path, field: str) -> Iterator[Document]:
  """The documents of one file.

  Args:
    path: a file that `matches` gave.
    field: the key of the text in .jsonl records.

  Raises:
    ConfigError: the file is empty, damaged, not UTF-8 text, or a record is not what was expected.
  """
  with unpacked(path) as stream:
    if _kind(path) == '.txt':
      text = _decode(stream.read(), f'{path}', 0)
      if not text.strip():
        raise ConfigError(f'{path}: the file is empty')
      yield Document(source=str(path), title=path.name, text=text)
      return
    found, offset = 0, 0
    for number, line in enumerate(stream, start=1):
      where = f'{path}:{number}'
      text = _record(_decode(line, where, offset), field, where)
      offset += len(line)
      if text.strip():
        found += 1
        yield Document(source=str(path), title=f'{path.name}:{number}', text=text)
    if not found:
      raise ConfigError(f'{path}: ' + ('no record has any text' if offset else 'the file is empty'))


def pairs(path: pathlib.Path, prompt: str, completion: str) -> Iterator[Document]:
  """The prompts and completions of one .jsonl file.

  Args:
    path: a file that `matches` gave.
    prompt: the key of what is given; it may be an empty text.
    completion: the key of what is learnt.

  Raises:
    ConfigError: the file is no .jsonl file, is empty or damaged, or a row is not what was expected.
  """
  if _kind(path) != '.jsonl':
    raise ConfigError(f'{path}: prompts and completions come in .jsonl files')
  found, offset = 0, 0
  with unpacked(path) as stream:
    for number, line in enumerate(stream, start=1):
      where = f'{path}:{number}'
      record = _parse(_decode(line, where, offset), where)
      offset += len(line)
      if record is None:
        continue
      given, text = (_field(record, key, where) for key in (prompt, completion))
      if not text:
        raise ConfigError(f'{where}: field {completion!r} is empty: there is nothing to learn')
      found += 1
      yield Document(source=str(path), title=f'{path.name}:{number}', prompt=given, text=text)
  if not found:
    raise ConfigError(f'{path}: the file is empty')


def _decode(content: bytes, where: str, offset: int) -> str:
  """Decodes UTF-8 or says at which byte of the (unpacked) file it ends to be that."""
  if content.startswith((b'\xff\xfe', b'\xfe\xff')) and not offset:
    raise ConfigError(f'{where}: the file is UTF-16; expected UTF-8')
  null = content.find(b'\0')
  if null >= 0:
    raise ConfigError(f'{where}: binary data (a zero byte at byte {offset + null}); expected text')
  try:
    text = content.decode('utf-8')
  except UnicodeDecodeError as error:
    raise ConfigError(
      f'{where}: not UTF-8 at byte {offset + error.start} '
      f'(0x{content[error.start]:02x}: {error.reason}); expected UTF-8 text'
    ) from error
  return text if offset else text.removeprefix('\ufeff')


def _record(line: str, field: str, where: str) -> str:
  """The text in one line of a .jsonl file; '' for a blank line."""
  record = _parse(line, where)
  return '' if record is None else _field(record, field, where)


def _parse(line: str, where: str) -> dict[str, Any] | None:
  """The object in one line of a .jsonl file; None for a blank line."""
  if not line.strip():
    return None
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    raise ConfigError(f'{where}: not JSON at column {error.colno}: {error.msg}') from error
  except RecursionError:
    raise ConfigError(f'{where}: not JSON that can be read: nested too deeply') from None
  if not isinstance(record, dict):
    raise ConfigError(f'{where}: expected a JSON object, found {type(record).__name__}')
  return record


def _field(record: dict[str, Any], field: str, where: str) -> str:
  """The text under a key of a record."""
  if field not in record:
    keys = ', '.join(map(repr, record)) or 'none'
    close = difflib.get_close_matches(field, record, n=1)
    hint = f'; did you mean {close[0]!r}?' if close else ''
    raise ConfigError(f'{where}: no field {field!r}; the keys are {keys}{hint}')
  text = record[field]
  if not isinstance(text, str):
    raise ConfigError(f'{where}: field {field!r} is {type(text).__name__}, expected a text')
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as error:
    raise ConfigError(f'{where}: half a surrogate pair at character {error.start}') from error
  return text
