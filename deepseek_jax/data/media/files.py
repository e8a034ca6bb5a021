"""Media of the user with captions: which can be used is found out once, all else is listed."""

import abc
import concurrent.futures
import dataclasses
import glob
import hashlib
import json
import os
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaFiles(abc.ABC):
  """What every source of the user's media is: kinds that are looked for, each with a caption.

  Attributes:
    sizes: what media are brought to.
    heldout_fraction: share that is held out; by the content of the media.
    longest: letters that a caption may have.
  """

  sizes: Sizes = Sizes()
  heldout_fraction: float = 0.1
  longest: int = 1000

  def __post_init__(self):
    if errors := self.faults():
      raise ConfigError(errors)

  @property
  @abc.abstractmethod
  def kinds(self) -> tuple[str, ...]:
    """Modalities that are looked for."""

  @abc.abstractmethod
  def paths(self) -> list[pathlib.Path]:
    """The files, sorted.

    Raises:
      ConfigError: there are none.
    """

  @abc.abstractmethod
  def items(self) -> tuple[list[Item], list[Fault]]:
    """What there is, and what has no caption or cannot be told apart; media are not decoded."""

  @abc.abstractmethod
  def read(self, where: tuple) -> bytes:
    """The bytes of a medium."""

  def faults(self) -> list[str]:
    """What is wrong with the fields, as messages."""
    name, known = type(self).__name__, ', '.join(EXTENSIONS)
    errors = [
      f'{name}.kinds: expected some of {known}, found {kind!r}'
      for kind in self.kinds
      if kind not in EXTENSIONS
    ]
    if not self.kinds:
      errors.append(f'{name}.kinds: expected some of {known}, found none')
    if not 0 < self.heldout_fraction < 1:
      errors.append(
        f'{name}.heldout_fraction: expected between 0 and 1, found {self.heldout_fraction}'
      )
    if self.longest < 1:
      errors.append(f'{name}.longest: expected at least 1 letter, found {self.longest}')
    return errors

  @property
  def forms(self) -> dict[str, Form]:
    """What the arrays are."""
    return self.sizes.forms(self.kinds)

  def holds(self, kind: str) -> int:
    """Media of a kind that a document has, at most: one."""
    return int(kind in self.kinds)

  def fingerprint(self) -> str:
    """Hexadecimal hash of names, sizes and times, and of what is done with the files."""
    lines = [f'media files 1 {self!r}', *(stamp(path) for path in self.paths())]
    return hashlib.sha256('\n'.join(lines).encode('utf-8', 'surrogateescape')).hexdigest()

  def open(self, cache_dir: pathlib.Path) -> 'FileRecords':
    """Decodes every medium once, or opens what an earlier run found out.

    Raises:
      ConfigError: there are no files, nothing in them can be used, or a library is missing.
    """
    return open_files(self, cache_dir)


@dataclasses.dataclass(frozen=True)
class MatchingFiles(MediaFiles):
  """Files of one format that a pattern names.

  Attributes:
    pattern: a path or glob.
    sizes: what media are brought to.
    heldout_fraction: share that is held out; by the content of the media.
    longest: letters that a caption may have.
  """

  ENDING: ClassVar[str]

  pattern: str

  def faults(self) -> list[str]:
    """What is wrong with the fields, as messages."""
    errors = super().faults()
    if not self.pattern:
      errors.append(
        f"{type(self).__name__}.pattern: expected a path or a glob of {self.ENDING} files, found ''"
      )
    return errors

  def paths(self) -> list[pathlib.Path]:
    """The files that match, sorted.

    Raises:
      ConfigError: there are none, or one has another ending.
    """
    field = f'{type(self).__name__}.pattern'
    paths = [pathlib.Path(path) for path in sorted(glob.glob(self.pattern, recursive=True))]
    if not paths:
      raise ConfigError(f'{field}: no file matches {self.pattern!r}')
    wrong = [str(path) for path in paths if path.suffix.lower() != self.ENDING]
    if wrong:
      raise ConfigError(
        f'{field}: expected files that end in {self.ENDING} (not compressed), found '
        f'{", ".join(wrong[:3])}'
      )
    return paths


def open_files(source: MediaFiles, cache_dir: pathlib.Path) -> 'FileRecords':
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


def _sift(source: MediaFiles) -> tuple[list[list[Any]], list[Fault]]:
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


def _split(rows: list[list[Any]], source: MediaFiles) -> dict[str, tuple[Item, ...]]:
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

  source: MediaFiles
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


def stamp(path: pathlib.Path) -> str:
  """Name, size and time of a file: what tells that it is as it was."""
  found = path.stat()
  return f'{path} {found.st_size} {found.st_mtime_ns}'


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
