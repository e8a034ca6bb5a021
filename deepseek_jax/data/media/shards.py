"""Media in archives: tar files in the layout of WebDataset, and tables of Parquet."""

import dataclasses
import functools
import os
import pathlib
import tarfile
from typing import Any

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.media.caption_file import SIDECARS, checked, from_sidecar
from deepseek_jax.data.media.decode import EXTENSIONS, kind_of
from deepseek_jax.data.media.files import FileRecords, Item, MatchingFiles, read_range
from deepseek_jax.data.media.optional import need
from deepseek_jax.data.media.record import Fault, UnreadableError


@dataclasses.dataclass(frozen=True)
class TarShards(MatchingFiles):
  """Plain tar files in the layout of WebDataset: what belongs together has one name up to a dot.

  `0001.jpg`, `0001.wav` and `0001.txt` (or `.json` with a `caption`) are one document of a picture,
  a sound and a caption. Shards are read at random places, so they are not compressed.

  Attributes:
    pattern: a path or glob of .tar files.
    kinds: what is looked for: image, video, sound, points; a sample has one of each at most.
    sizes: what media are brought to.
    heldout_fraction: share that is held out; by the content of the files.
    longest: letters that a caption may have.
  """

  ENDING = '.tar'

  _: dataclasses.KW_ONLY
  kinds: tuple[str, ...] = ('image',)

  def read(self, where: tuple) -> bytes:
    """The bytes of a member."""
    return read_range(*where)

  def items(self) -> tuple[list[Item], list[Fault]]:
    """Samples with a caption, and what is left out."""
    items: list[Item] = []
    faults: list[Fault] = []
    for path in self.paths():
      samples: dict[str, dict[str, tuple[int, int]]] = {}
      for key, ending, start, size in self._members(path, faults):
        parts = samples.setdefault(key, {})
        if ending in parts:
          parts['twice'] = (start, size)
        parts[ending] = (start, size)
      for key, parts in samples.items():
        name = f'{path.name}: {key}'
        try:
          items.append(self._item(str(path), name, key, parts))
        except UnreadableError as error:
          faults.append(Fault(name=name, reason=str(error)))
    return items, faults

  def _members(self, path: pathlib.Path, faults: list[Fault]):
    """Yields name up to the first dot, ending, start and size of each file in a shard."""
    size = path.stat().st_size
    try:
      with tarfile.open(path, 'r:') as archive:
        for member in archive:
          if not member.isfile():
            continue
          if member.offset_data + member.size > size:
            raise tarfile.ReadError(f'{member.name} ends beyond the file')
          folder, _, name = member.name.rpartition('/')
          stem, _, ending = name.partition('.')
          if stem:
            yield f'{folder}/{stem}' if folder else stem, ending.lower(), *_place(member)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
      faults.append(Fault(name=path.name, reason=f'a damaged archive, read up to there: {error}'))

  def _item(self, path: str, name: str, key: str, parts: dict[str, tuple[int, int]]) -> Item:
    """One sample.

    Raises:
      UnreadableError: a medium or the caption is missing, or there are two.
    """
    if 'twice' in parts:
      raise UnreadableError('two files of one name')
    media: dict[str, tuple[str, str, tuple]] = {}
    for ending, place in parts.items():
      kind = kind_of(f'x.{ending}')
      if kind in self.kinds:
        if kind in media:
          raise UnreadableError(f'two files of the kind {kind}')
        media[kind] = (kind, f'{key}.{ending}', (path, *place))
    if not media:
      raise UnreadableError(f'no {" or ".join(self.kinds)} in it')
    captions = {}
    for ending in (e for e in SIDECARS if e[1:] in parts):
      data = read_range(path, *parts[ending[1:]])
      captions[ending] = from_sidecar(f'x{ending}', data, self.longest)
    if not captions:
      raise UnreadableError('no caption')
    if len(set(captions.values())) > 1:
      raise UnreadableError(f'different captions in {" and ".join(captions)}')
    ordered = tuple(media[kind] for kind in EXTENSIONS if kind in media)
    return Item(name=name, caption=next(iter(captions.values())), media=ordered)


def _place(member: tarfile.TarInfo) -> tuple[int, int]:
  return member.offset_data, member.size


@dataclasses.dataclass(frozen=True)
class ParquetFiles(MatchingFiles):
  """Tables of media and captions; needs pyarrow (extra `media`).

  A medium is a column of bytes, or of `{bytes, path}` as in the tables of the Hugging Face hub.

  Attributes:
    pattern: a path or glob of .parquet files.
    kind: what the media are: image, video, sound or points.
    medium: column of the media.
    caption: column of the captions.
    ending: of the name of a medium that has none, which says the format of clouds.
    sizes: what media are brought to.
    heldout_fraction: share that is held out; by the content of the media.
    longest: letters that a caption may have.
  """

  ENDING = '.parquet'

  _: dataclasses.KW_ONLY
  kind: str = 'image'
  medium: str = 'image'
  caption: str = 'caption'
  ending: str = ''

  @property
  def kinds(self) -> tuple[str, ...]:
    """The one kind."""
    return (self.kind,)

  def open(self, cache_dir: pathlib.Path) -> FileRecords:
    """Decodes every medium once, or opens what an earlier run found out.

    Raises:
      ConfigError: pyarrow is missing, no file matches, or nothing in them can be used.
    """
    need('pyarrow', 'ParquetFiles')
    return super().open(cache_dir)

  def read(self, where: tuple) -> bytes:
    """The bytes of a medium."""
    path, group, row = where
    value = _column(path, group, self.medium, os.getpid())[row].as_py()
    value = value.get('bytes') if isinstance(value, dict) else value
    if not isinstance(value, bytes):
      raise UnreadableError(f'the medium is {type(value).__name__}, not bytes')
    return value

  def items(self) -> tuple[list[Item], list[Fault]]:
    """Rows with a caption, and what is left out."""
    import pyarrow
    import pyarrow.parquet

    items: list[Item] = []
    faults: list[Fault] = []
    for path in self.paths():
      try:
        table = pyarrow.parquet.ParquetFile(path)
        missing = {self.medium, self.caption} - set(table.schema_arrow.names)
        if missing:
          raise ConfigError(
            f'{path}: no column {" and ".join(sorted(missing))}; there are '
            f'{", ".join(table.schema_arrow.names)}'
          )
        for group in range(table.num_row_groups):
          captions = table.read_row_group(group, [self.caption]).column(0).to_pylist()
          for row, caption in enumerate(captions):
            self._add(items, faults, path, (group, row), caption)
      except (pyarrow.ArrowException, OSError) as error:
        faults.append(Fault(name=path.name, reason=f'a damaged table: {error}'))
    return items, faults

  def _add(
    self,
    items: list[Item],
    faults: list[Fault],
    path: pathlib.Path,
    place: tuple[int, int],
    caption: Any,
  ) -> None:
    """Adds one row to what can be used, or to what cannot."""
    name = f'{path.name}: group {place[0]}, row {place[1]}'
    try:
      text = checked(caption, self.longest)
    except UnreadableError as error:
      faults.append(Fault(name=name, reason=str(error)))
      return
    medium = (self.kind, f'x.{self.ending}', (str(path), *place))
    items.append(Item(name=name, caption=text, media=(medium,)))


@functools.lru_cache(maxsize=4)
def _column(path: str, group: int, name: str, process: int) -> Any:
  """A column of a group of rows, kept for the next reads, in every process anew."""
  del process
  import pyarrow.parquet

  return pyarrow.parquet.ParquetFile(path).read_row_group(group, [name]).column(0)
