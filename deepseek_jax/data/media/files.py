"""Media of the user with captions: which can be used is found out once, all else is listed."""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data import store
from deepseek_jax.data.media.decode import EXTENSIONS, Sizes, decode
from deepseek_jax.data.media.record import Fault, Form, Learnt, Medium, Record, UnreadableError
from deepseek_jax.data.progress import Progress, say
from deepseek_jax.data.split import Split, heldout_cut

_SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
  """Media that belong together, and their caption.

  Attributes:
    name: of the file or the sample.
    caption: text.
    media: kind, name of the file, and where its bytes are, of each medium; JSON-able.
  """

  name: str
  caption: str
  media: tuple[tuple[str, str, tuple], ...]


class FileSource(Protocol):
  """A config that says where media of the user are."""

  @property
  def kinds(self) -> tuple[str, ...]:
    """Modalities that are looked for."""

  @property
  def sizes(self) -> Sizes:
    """What media are brought to."""

  @property
  def heldout_fraction(self) -> float:
    """Share that is held out."""

  def fingerprint(self) -> str:
    """Hexadecimal hash of names, sizes, times and captions."""

  def items(self) -> tuple[list[Item], list[Fault]]:
    """What there is, and what has no caption or cannot be told apart; media are not decoded."""

  def read(self, where: tuple) -> bytes:
    """The bytes of a medium."""


def check_file_source(source: Any) -> list[str]:
  """Messages for the fields that all sources of files have."""
  name = type(source).__name__
  errors = [
    f'{name}.kinds: expected some of {", ".join(EXTENSIONS)}, found {kind!r}'
    for kind in source.kinds
    if kind not in EXTENSIONS
  ]
  if not source.kinds:
    errors.append(f'{name}.kinds: expected some of {", ".join(EXTENSIONS)}, found none')
  if not 0 < source.heldout_fraction < 1:
    errors.append(
      f'{name}.heldout_fraction: expected between 0 and 1, found {source.heldout_fraction}'
    )
  if source.longest < 1:
    errors.append(f'{name}.longest: expected at least 1 letter, found {source.longest}')
  return errors


def open_files(source: FileSource, cache_dir: pathlib.Path) -> 'FileRecords':
  """Decodes every medium once, or opens what an earlier run found out; says what is left out.

  Raises:
    ConfigError: nothing can be used, or a library is missing.
  """

  def build(scratch: pathlib.Path) -> dict[str, Any]:
    kept, faults = _sift(source)
    (scratch / 'items.json').write_text(json.dumps(kept), encoding='utf-8')
    (scratch / 'faults.json').write_text(
      json.dumps([[fault.name, fault.reason] for fault in faults]), encoding='utf-8'
    )
    return {}

  name = store.key('media_files', {'source': source.fingerprint()})
  folder = store.entry(cache_dir, name, build).path
  rows = json.loads((folder / 'items.json').read_text(encoding='utf-8'))
  faults = tuple(
    Fault(name=n, reason=r)
    for n, r in json.loads((folder / 'faults.json').read_text(encoding='utf-8'))
  )
  what = type(source).__name__
  if faults:
    shown = '; '.join(f'{fault.name}: {fault.reason}' for fault in faults[:_SHOWN])
    more = f'; and {len(faults) - _SHOWN} more' if len(faults) > _SHOWN else ''
    say(f'{what}: {len(rows)} can be used, {len(faults)} left out: {shown}{more}')
  if len(rows) < 2:
    listed = ''.join(f'\n  {fault.name}: {fault.reason}' for fault in faults[:20])
    raise ConfigError(
      f'{what}: {len(rows)} captioned media can be used, expected at least two, one of them to be '
      f'held out; left out are {len(faults)}{listed}'
    )
  return FileRecords(source=source, rows=_split(rows, source), faults=faults)


def _sift(source: FileSource) -> tuple[list[list[Any]], list[Fault]]:
  """Items that can be decoded, as JSON rows with a place in [0, 1), and the faults of others."""
  items, faults = source.items()
  progress = Progress('checking', 'media')
  kept = []

  def check(item: Item) -> float | str:
    digest = hashlib.sha256()
    for kind, name, where in item.media:
      try:
        data = source.read(where)
        decode(kind, name, data, source.sizes)
      except (UnreadableError, OSError) as error:
        return str(error)
      digest.update(hashlib.sha256(data).digest())
    return int.from_bytes(digest.digest()[:6], 'big') / 2**48

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for count, (item, found) in enumerate(zip(items, pool.map(check, items))):
      if isinstance(found, str):
        faults.append(Fault(name=item.name, reason=found))
      else:
        kept.append([item.name, item.caption, item.media, found])
      progress.update(count)
  progress.finish(len(items))
  return kept, faults


def _split(rows: list[list[Any]], source: FileSource) -> dict[str, tuple[Item, ...]]:
  """Items by split: copies of one file are on one side, and no file moves when others come."""
  cut = heldout_cut([row[3] for row in rows], source.heldout_fraction, type(source).__name__)
  result: dict[str, list[Item]] = {'train': [], 'heldout': []}
  for name, caption, media, place in rows:
    parts = tuple((kind, file, tuple(where)) for kind, file, where in media)
    item = Item(name=name, caption=caption, media=parts)
    result['heldout' if place <= cut else 'train'].append(item)
  return {split: tuple(items) for split, items in result.items()}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FileRecords:
  """Documents of the user's media, each followed by its caption.

  Attributes:
    source: where they are.
    rows: what can be used, by split.
    faults: what cannot, and why.
  """

  source: FileSource
  rows: dict[str, tuple[Item, ...]]
  faults: tuple[Fault, ...]

  def count(self, split: Split) -> int:
    """Number of documents."""
    return len(self.rows[split])

  def record(self, split: Split, index: int) -> Record:
    """One document: media, then their caption."""
    item = self.rows[split][index]
    media = tuple(Medium(modality=kind) for kind, _, _ in item.media)
    return Record(name=item.name, parts=(*media, Learnt(text=item.caption)))

  def walk(self, split: Split) -> Iterator[Record]:
    """All documents of a split, in order."""
    return (self.record(split, index) for index in range(self.count(split)))

  def render(self, split: Split, index: int) -> list[np.ndarray]:
    """The media of a document, decoded now.

    Raises:
      UnreadableError: a file is gone, or no longer what it was.
    """
    arrays = []
    for kind, name, where in self.rows[split][index].media:
      try:
        data = self.source.read(where)
      except OSError as error:
        raise UnreadableError(f'{name}: {error.strerror or error}') from error
      arrays.append(decode(kind, name, data, self.source.sizes))
    return arrays


def file_forms(source: Any) -> dict[str, Form]:
  """What the arrays of a source of files are."""
  return source.sizes.forms(source.kinds)


def stamp(path: pathlib.Path) -> str:
  """Name, size and time of a file: what tells that it is as it was."""
  found = path.stat()
  return f'{path} {found.st_size} {found.st_mtime_ns}'


def hashed(version: str, parts: Sequence[str]) -> str:
  """Hexadecimal hash of some texts."""
  return hashlib.sha256('\n'.join([version, *parts]).encode('utf-8', 'surrogateescape')).hexdigest()


def fault_table(faults: Sequence[Fault]) -> str:
  """What was left out, as lines: how often each reason, then every file."""
  counts = Counter(fault.reason.split(':')[0] for fault in faults)
  lines = [f'{count:6d}  {reason}' for reason, count in counts.most_common()]
  return '\n'.join([*lines, *(f'{fault.name}: {fault.reason}' for fault in faults)])


def read_range(path: str, start: int, size: int) -> bytes:
  """Some bytes of a file."""
  with open(path, 'rb') as stream:
    stream.seek(start)
    return stream.read(size)
