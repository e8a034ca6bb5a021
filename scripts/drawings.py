"""Reads, draws, compares and describes the drawings that `build_images.py` packs."""

import dataclasses
import hashlib
import io
import pathlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

import numpy as np

# Drawn before it is made small; finer lines would be lost, coarser ones jagged.
_DRAWN = 192
_LONGEST = 2048

_TERMS = '{http://purl.org/dc/elements/1.1/}'
_ITEM = '{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li'

# Words of the collection's own bookkeeping, which say nothing about what is drawn.
_NO_KEYWORD = set(
  'hash magick mapsym misc openclipart sign special theme unsorted signs_and_symbols'.split()
)
_MOST_KEYWORDS, _LONGEST_KEYWORD, _MOST_NAME_WORDS = 5, 20, 3

# Three drawings take minutes each, for blurs of thousands of pixels.
_SLOW = {
  'food/fruit/orange_slice_jonathan_di_01.svg',
  'transportation/road_runner_ganson.svg',
  'unsorted/fattoria.svg',
}


@dataclasses.dataclass(frozen=True)
class Drawing:
  """What is known of one drawing.

  Attributes:
    name: path in the collection.
    keywords: from its folders, then its own.
    title: its name in plain words, without its author; may be empty.
    digest: SHA-256 of the file.
  """

  name: str
  keywords: tuple[str, ...]
  title: str
  digest: str

  @property
  def family(self) -> str:
    """What numbered drawings of one series in one folder have in common."""
    folder, _, stem = self.name.removesuffix('.svg').rpartition('/')
    return f'{folder}/{re.sub(r"[0-9]+", "", stem).strip("_-")}'


def read(path: str, name: str, side: int) -> tuple[Drawing, np.ndarray, str]:
  """Reads and draws one file.

  Args:
    path: of the file.
    name: its path in the collection.
    side: pixels S of the picture.

  Returns:
    What is known of it; the picture [S, S, 3] uint8 on white; and why it cannot be used, or ''.
  """
  content = pathlib.Path(path).read_bytes()
  digest = hashlib.sha256(content).hexdigest()
  title, author, own = _terms(content)
  keywords = tuple(_keywords(name, own))
  drawing = Drawing(name, keywords, _plain_title(name, title, author), digest)
  nothing = np.zeros((side, side, 3), np.uint8)
  if name in _SLOW:
    return drawing, nothing, 'too slow'
  try:
    return drawing, _picture(content, side), ''
  except Exception as error:  # the renderer raises whatever a malformed file makes it stumble on
    return drawing, nothing, type(error).__name__


def _picture(content: bytes, side: int) -> np.ndarray:
  """Draws a file on white, its longer side filling the picture."""
  import cairosvg
  from PIL import Image

  with Image.open(io.BytesIO(cairosvg.svg2png(bytestring=content, output_width=_DRAWN))) as png:
    drawn = png.convert('RGBA')
  if max(drawn.size) > _LONGEST:
    raise ValueError('a strip, not a picture')
  white = Image.new('RGBA', drawn.size, 'white')
  white.alpha_composite(drawn)
  scale = side / max(drawn.size)
  width, height = (max(1, round(length * scale)) for length in drawn.size)
  small = white.convert('RGB').resize((width, height), Image.Resampling.LANCZOS)
  picture = Image.new('RGB', (side, side), 'white')
  picture.paste(small, ((side - width) // 2, (side - height) // 2))
  return np.asarray(picture)


def encode(picture: np.ndarray, quality: int) -> bytes:
  """Packs a picture [S, S, 3] uint8 as WebP."""
  from PIL import Image

  stream = io.BytesIO()
  Image.fromarray(picture).save(stream, 'WEBP', quality=quality, method=6)
  return stream.getvalue()


def _terms(content: bytes) -> tuple[str, str, list[str]]:
  """Title, author and keywords that stand in a file."""
  root = ElementTree.fromstring(content)
  for work in root.iter():
    if work.tag.endswith('}Work'):
      subject, creator = work.find(f'{_TERMS}subject'), work.find(f'{_TERMS}creator')
      items = [] if subject is None else [item.text or '' for item in subject.iter(_ITEM)]
      names = [] if creator is None else [n.text or '' for n in creator.iter(f'{_TERMS}title')]
      return work.findtext(f'{_TERMS}title') or '', ' '.join(names), items
  return '', '', []


def _words(text: str) -> list[str]:
  """Lower-case words of ASCII letters, without numbers at their ends; none with one inside."""
  text = unicodedata.normalize('NFKD', text).encode('ascii', 'ignore').decode('ascii').lower()
  words = (word.strip('0123456789') for word in re.split(r'[^a-z0-9]+', text))
  return [word for word in words if word.isalpha()]


def _singular(words: Iterable[str]) -> set[str]:
  return {w.removesuffix('s') for w in words}


def _keywords(name: str, own: Sequence[str]) -> list[str]:
  """Keywords from the folders, outermost first, then those of the file, each said once."""
  folders = name.split('/')[:-1]
  result = []
  for text in (*folders, *sorted(own)):
    words = _words(text)
    keyword = ' '.join(words)
    fits = '_'.join(words) not in _NO_KEYWORD and 2 < len(keyword) <= _LONGEST_KEYWORD
    if fits and keyword not in result:
      result.append(keyword)
  return result


def _plain_title(name: str, title: str, author: str) -> str:
  """The title where the file is named for it, else the file's name without its author."""
  stem = _words(pathlib.PurePosixPath(name).stem)
  given = _words(title)
  if given and stem and stem[: len(given)] == given[: len(stem)]:
    return ' '.join(given[:_MOST_NAME_WORDS])
  authors = _words(author)
  words = []
  for word in stem:
    if any(name.startswith(word) for name in authors if len(word) > 1):
      break
    words.append(word)
  return ' '.join(w for w in words[:_MOST_NAME_WORDS] if len(w) > 1)


def captions(all_drawings: Sequence[Drawing]) -> list[tuple[list[str], str]]:
  """Keywords and caption of every drawing.

  Keywords that more drawings have come first, so that a caption goes from the general to the
  particular; those whose words have all been said already are dropped.
  """
  counts = Counter(keyword for drawing in all_drawings for keyword in drawing.keywords)
  result = []
  for drawing in all_drawings:
    chosen: list[str] = []
    said: set[str] = set()
    for keyword in sorted(drawing.keywords, key=lambda k: (-counts[k], k)):
      new = _singular(keyword.split()) - said
      if new and len(chosen) < _MOST_KEYWORDS:
        chosen.append(keyword)
        said |= new
    caption = ', '.join(chosen)
    if drawing.title and _singular(drawing.title.split()) - said:
      caption += f': {drawing.title}'
    result.append((chosen, caption))
  return result


def variants(pictures: np.ndarray, families: Sequence[str], same: float) -> list[list[int]]:
  """Groups pictures that show one drawing: by likeness, and by a numbered name in one folder.

  Args:
    pictures: [n, S, S, 3] uint8.
    families: a name for each; equal names are one group.
    same: correlation of grey 16 × 16 cells above which two are variants.

  Returns:
    Groups of indices, each ascending, by first index. Likeness is passed on: a chain of variants
    is one group.
  """
  count, side = pictures.shape[:2]
  grey = pictures.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
  cells = grey.reshape(count, 16, side // 16, 16, side // 16).mean(axis=(2, 4)).reshape(count, -1)
  cells -= cells.mean(axis=1, keepdims=True)
  cells /= np.linalg.norm(cells, axis=1, keepdims=True) + 1e-9
  parents = list(range(count))

  def root(i: int) -> int:
    while parents[i] != i:
      parents[i] = parents[parents[i]]
      i = parents[i]
    return i

  def join(i: int, j: int) -> None:
    low, high = sorted((root(i), root(j)))
    parents[high] = low

  first: dict[str, int] = {}
  for i, family in enumerate(families):
    join(i, first.setdefault(family, i))
  for start in range(0, count, 512):
    likeness = cells[start : start + 512] @ cells.T
    for i, j in np.argwhere(likeness > same).tolist():
      join(start + i, j)
  groups: dict[int, list[int]] = {}
  for i in range(count):
    groups.setdefault(root(i), []).append(i)
  return list(groups.values())
