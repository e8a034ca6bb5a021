"""Where text comes from: the corpus in the package, or the reader's own files."""

import dataclasses
import functools
import hashlib
import json
import lzma
from collections.abc import Iterator

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data import text_file
from deepseek_jax.data.document import Document
from deepseek_jax.data.pairs import Pairs
from deepseek_jax.data.progress import say
from deepseek_jax.data.split import Split, heldout_cut, place_of
from deepseek_jax.data.tokenizer import CORPUS_FOLDER

EMBEDDED_SOURCES = ('sotu', 'austen', 'moby_dick', 'kjv')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedded:
  """The 20 MB of public-domain English in the package; its split is fixed.

  Attributes:
    sources: which of State of the Union addresses (`sotu`), Jane Austen (`austen`), Moby Dick
      (`moby_dick`) and the King James Bible (`kjv`) to read, in this order.
  """

  sources: tuple[str, ...] = EMBEDDED_SOURCES

  def __post_init__(self):
    """Refuses unknown, repeated and no sources."""
    expected = f'expected some of {", ".join(EMBEDDED_SOURCES)}'
    unknown = [s for s in self.sources if s not in EMBEDDED_SOURCES]
    if unknown or not self.sources:
      raise ConfigError(f'Embedded.sources: {expected}; found {unknown or "none"}')
    if len(set(self.sources)) < len(self.sources):
      raise ConfigError(f'Embedded.sources: {expected}, each once; found {self.sources}')

  def documents(self, split: Split) -> Iterator[Document]:
    """The documents of a split, in order."""
    for source in self.sources:
      with lzma.open(CORPUS_FOLDER / f'{source}.jsonl.xz') as lines:
        for line in lines:
          record = json.loads(line)
          if record['split'] == split:
            yield Document(source=source, title=record['title'], text=record['text'])

  def fingerprint(self) -> str:
    """Hexadecimal hash of the files and their order."""
    digest = hashlib.sha256(b'embedded 1')
    for source in self.sources:
      content = (CORPUS_FOLDER / f'{source}.jsonl.xz').read_bytes()
      digest.update(source.encode('utf-8') + hashlib.sha256(content).digest())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class TextFiles:
  """Text files of the reader: .txt (a document each) or .jsonl (a document a line).

  A document is held out when the hash of its text says so: adding files never moves the others, and
  copies of one text stay on one side. A single document is cut at a paragraph near its end.

  Attributes:
    pattern: a path or glob, `**` for any depth; names end in .txt or .jsonl, plain or with .gz, .xz
      or .zst.
    heldout_fraction: share of the documents that is held out.
    field: the key of the text in a .jsonl record.
  """

  pattern: str
  _: dataclasses.KW_ONLY
  heldout_fraction: float = 0.02
  field: str = 'text'

  def __post_init__(self):
    """Refuses an empty pattern and a fraction outside (0, 1)."""
    messages = []
    if not self.pattern:
      messages.append("TextFiles.pattern: expected a path or a glob, found ''")
    if not 0 < self.heldout_fraction < 1:
      messages.append(
        f'TextFiles.heldout_fraction: expected between 0 and 1, found {self.heldout_fraction}'
      )
    if not self.field:
      messages.append("TextFiles.field: expected the key of the text, found ''")
    if messages:
      raise ConfigError(messages)

  def documents(self, split: Split) -> Iterator[Document]:
    """The documents of a split, in the order of the sorted paths.

    Raises:
      ConfigError: no file matches, or one cannot be read; says which and where in it.
    """
    cut = self._threshold()
    if cut is None:
      (document,) = self._all()
      yield _cut_single(document, split, self.heldout_fraction)
      return
    for document in self._all():
      if (place_of(document.text) <= cut) == (split == 'heldout'):
        yield document

  def fingerprint(self) -> str:
    """Hexadecimal hash of the files' names and contents and of what decides the split."""
    digest = hashlib.sha256(f'text 1 {self.heldout_fraction!r} {self.field}'.encode())
    for path in text_file.matches(self.pattern):
      with path.open('rb') as stream:
        content = hashlib.file_digest(stream, 'sha256').digest()
      digest.update(str(path).encode('utf-8', 'surrogateescape') + content)
    return digest.hexdigest()

  def _all(self) -> Iterator[Document]:
    """Every document of every file."""
    for path in text_file.matches(self.pattern):
      yield from text_file.documents(path, self.field)

  def _threshold(self) -> float | None:
    """Documents placed at or below this are held out; None if there is one document only."""
    return _threshold(self.fingerprint(), self)


@functools.lru_cache(maxsize=16)
def _threshold(fingerprint: str, source: TextFiles) -> float | None:
  """See `TextFiles._threshold`; kept so that reading both splits hashes the texts once."""
  del fingerprint  # only to notice that files have changed
  places = [place_of(document.text) for document in source._all()]
  if len(places) == 1:
    say(f'{source.pattern}: one document; its last part is held out')
    return None
  return heldout_cut(places, source.heldout_fraction, source.pattern)


def _cut_single(document: Document, split: Split, fraction: float) -> Document:
  """One side of a single document, cut at the paragraph, line or blank nearest below the place."""
  text = document.text
  if len(text) < 2:
    raise ConfigError(f'{document.source}: one document of one character cannot be split')
  place = min(max(int(len(text) * (1 - fraction)), 1), len(text) - 1)
  for mark in ('\n\n', '\n', ' '):
    found = text.rfind(mark, len(text) // 2, place)
    if found >= 0:
      place = found + len(mark)
      break
  part = text[:place] if split == 'train' else text[place:]
  return dataclasses.replace(document, text=part)


AnySource = Embedded | TextFiles | Pairs
