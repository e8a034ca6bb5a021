"""Folders of pictures, clips, sounds or clouds with their captions."""

import dataclasses
import pathlib
from collections import Counter

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.media.caption_file import (
  SIDECARS,
  TABLES,
  CaptionTable,
  from_sidecar,
  normal,
)
from deepseek_jax.data.media.decode import kind_of
from deepseek_jax.data.media.files import Item, MediaFiles
from deepseek_jax.data.media.record import Fault, UnreadableError


@dataclasses.dataclass(frozen=True)
class MediaFolder(MediaFiles):
  """A folder, and those in it, of media with captions.

  The caption of `a/b.png` is in `a/b.txt`, in `a/b.json` (`{"caption": …}`), or in a table of any
  folder above it, `.jsonl` or `.csv`, whose lines have a `file` (relative to the table) and a
  `caption`. A medium is left out, and listed with the reason, when it cannot be decoded, has no
  caption or an empty one, or when it is not certain whose caption it is.

  Attributes:
    path: the folder.
    kinds: what is looked for: image, video, sound, points.
    sizes: what media are brought to.
    heldout_fraction: share that is held out; by the content of the files.
    longest: letters that a caption may have.
  """

  path: str
  _: dataclasses.KW_ONLY
  kinds: tuple[str, ...] = ('image',)

  def read(self, where: tuple) -> bytes:
    """The bytes of a file."""
    return pathlib.Path(where[0]).read_bytes()

  def paths(self) -> list[pathlib.Path]:
    """The files, sorted.

    Raises:
      ConfigError: there is no such folder.
    """
    root = pathlib.Path(self.path)
    if not root.is_dir():
      raise ConfigError(f'MediaFolder.path: {self.path} is no folder')
    found = (p for p in root.rglob('*') if p.is_file())
    # Hidden files are those of systems and editors.
    return sorted(
      p for p in found if not any(part.startswith('.') for part in p.relative_to(root).parts)
    )

  def items(self) -> tuple[list[Item], list[Fault]]:
    """Media with a caption each, and what is left out."""
    root = pathlib.Path(self.path)
    paths = self.paths()
    table = CaptionTable(root=root, longest=self.longest)
    media, sidecars, faults = [], {}, []
    for path in paths:
      ending = path.suffix.lower()
      if ending in TABLES:
        table.read(path)
      elif ending in SIDECARS:
        sidecars[normal(path.relative_to(root).as_posix())] = path
      elif kind_of(path.name) in self.kinds:
        media.append(path)
      elif kind_of(path.name) is None:
        faults.append(Fault(name=path.relative_to(root).as_posix(), reason='of no known kind'))
    stems = Counter(_stem(root, path) for path in media)
    items = []
    for path in media:
      name = path.relative_to(root).as_posix()
      try:
        caption = self._caption(root, path, table, sidecars, stems)
      except (UnreadableError, OSError) as error:
        faults.append(Fault(name=name, reason=str(error)))
        continue
      place = (kind_of(path.name) or '', name, (str(path),))
      items.append(Item(name=name, caption=caption, media=(place,)))
    known = {normal(path.relative_to(root).as_posix()) for path in media}
    lost = sorted((table.captions.keys() | table.broken.keys()) - known)
    faults += [Fault(name=name, reason='has a caption, but there is no such file') for name in lost]
    return items, faults + table.faults

  def _caption(
    self,
    root: pathlib.Path,
    path: pathlib.Path,
    table: CaptionTable,
    sidecars: dict[str, pathlib.Path],
    stems: Counter,
  ) -> str:
    """The one caption of a medium.

    Raises:
      UnreadableError: there is none, or more than one.
    """
    name, stem = normal(path.relative_to(root).as_posix()), _stem(root, path)
    if name in table.broken:
      raise UnreadableError(table.broken[name])
    found = {}
    if name in table.captions:
      found['a table'] = table.captions[name]
    for ending in SIDECARS:
      sidecar = sidecars.get(stem + ending)
      if sidecar is None:
        continue
      if stems[stem] > 1:
        raise UnreadableError(f'{stem}{ending} could be the caption of {stems[stem]} files')
      found[stem + ending] = from_sidecar(sidecar.name.lower(), sidecar.read_bytes(), self.longest)
    if not found:
      raise UnreadableError('no caption')
    if len(set(found.values())) > 1:
      raise UnreadableError(f'different captions in {" and ".join(found)}')
    return next(iter(found.values()))


def _stem(root: pathlib.Path, path: pathlib.Path) -> str:
  """The path without the ending of the name."""
  return normal(path.relative_to(root).with_suffix('').as_posix())
