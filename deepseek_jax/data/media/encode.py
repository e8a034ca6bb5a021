"""Documents of several modalities to tokens, once: a place in a row for every part of a medium."""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.data import store
from deepseek_jax.data.media.record import Learnt, MediaSource, Medium, Record, Records
from deepseek_jax.data.progress import Progress
from deepseek_jax.data.split import Split
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.layers.context import MEDIA

KINDS = tuple(kind for kind in MEDIA if kind in ('image', 'video', 'sound', 'points'))
"""Kinds of media of a document, in the order in which their embeddings are numbered in a row."""

SLOT_BITS = 16
"""A place holds the number of the medium in its document, and in so many low bits the slot's."""

_CHUNK = 1024


class Ids(NamedTuple):
  """A document as tokens, bos and eos among them.

  Attributes:
    tokens: [n] int32; pad where a medium stands.
    learnt: [n] bool, whether the token is learnt.
    places: [n] int32, which medium and which of its slots stands there; -1 is a token.
  """

  tokens: np.ndarray
  learnt: np.ndarray
  places: np.ndarray


def document_ids(
  record: Record, texts: Sequence[np.ndarray], tokenizer: Tokenizer, slots: Mapping[str, int]
) -> Ids:
  """Lays a document out: bos, its parts in order, eos, which is learnt as what is before it.

  Args:
    record: the document.
    texts: ids of its texts, in order.
    tokenizer: that made them.
    slots: tokens that a medium of each kind takes the place of; 0 leaves it out of the row.
  """
  tokens, learnt, places = [[tokenizer.bos]], [[False]], [[-1]]
  remaining = iter(texts)
  medium, last = 0, False
  for part in record.parts:
    if isinstance(part, Medium):
      count = slots[part.modality]
      tokens.append([tokenizer.pad] * count)
      places.append(((medium << SLOT_BITS) + np.arange(count)).tolist())
      medium, last = medium + 1, False
    else:
      ids = next(remaining).tolist()
      count, last = len(ids), isinstance(part, Learnt)
      tokens.append(ids)
      places.append([-1] * count)
    learnt.append([last] * count)
  tokens.append([tokenizer.eos])
  learnt.append([last])
  places.append([-1])
  return Ids(
    np.array(list(itertools.chain(*tokens)), np.int32),
    np.array(list(itertools.chain(*learnt)), bool),
    np.array(list(itertools.chain(*places)), np.int32),
  )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
  """The documents of one split of one source as tokens, in files.

  Attributes:
    path: folder of the files; they are mapped when they are first needed, in every process anew.
    fingerprint: name of the folder, which says all that decided its content.
  """

  path: pathlib.Path
  fingerprint: str

  def __reduce__(self):
    """Goes to another process as a path: a mapped array would go as its content."""
    return _encoded, (self.path, self.fingerprint)

  def _array(self, name: str) -> np.ndarray:
    return np.load(self.path / f'{name}.npy', mmap_mode='r')

  @functools.cached_property
  def tokens(self) -> np.ndarray:
    """[n] int32 tokens of all documents."""
    return self._array('tokens')

  @functools.cached_property
  def learnt(self) -> np.ndarray:
    """[n] bool, which are learnt."""
    return self._array('learnt')

  @functools.cached_property
  def places(self) -> np.ndarray:
    """[n] int32, which slot of which medium; -1 is a token."""
    return self._array('places')

  @functools.cached_property
  def offsets(self) -> np.ndarray:
    """[documents + 1] int64, where each document begins."""
    return self._array('offsets')

  @functools.cached_property
  def media(self) -> np.ndarray:
    """[documents, kinds] int64, media of each of `KINDS` in each document."""
    return self._array('media')

  @functools.cached_property
  def text_bytes(self) -> np.ndarray:
    """[documents] int64, UTF-8 bytes of what is learnt of each."""
    return self._array('text_bytes')

  @functools.cached_property
  def names(self) -> tuple[str, ...]:
    """Name of each document."""
    return tuple(json.loads((self.path / 'names.json').read_text(encoding='utf-8')))


def _encoded(path: pathlib.Path, fingerprint: str) -> Encoded:
  return Encoded(path=path, fingerprint=fingerprint)


def encoded(
  source: MediaSource,
  records: Records,
  split: Split,
  tokenizer: Tokenizer,
  slots: Mapping[str, int],
  cache_dir: pathlib.Path,
) -> Encoded:
  """The documents of a split as tokens, from the store or made now.

  Args:
    source: of the documents.
    records: its documents.
    split: which of them.
    tokenizer: makes tokens of the texts.
    slots: tokens that a medium of each kind takes the place of.
    cache_dir: folder of the store.
  """
  slots = {kind: slots[kind] for kind in KINDS if kind in source.forms}

  def build(scratch: pathlib.Path) -> dict[str, Any]:
    _write(scratch, records.walk(split), tokenizer, slots)
    return {}

  name = store.key(
    'documents',
    {
      'source': source.fingerprint(),
      'tokenizer': tokenizer.fingerprint,
      'split': split,
      'slots': slots,
    },
  )
  return Encoded(path=store.entry(cache_dir, name, build).path, fingerprint=name)


def _write(
  folder: pathlib.Path, records: Iterator[Record], tokenizer: Tokenizer, slots: Mapping[str, int]
) -> None:
  """Writes the files of `Encoded`."""
  laid: list[Ids] = []
  names, media, sizes = [], [], []
  progress = Progress('encoding', 'documents')
  while chunk := list(itertools.islice(records, _CHUNK)):
    texts = [part.text for r in chunk for part in r.parts if not isinstance(part, Medium)]
    ids = iter(tokenizer.encode_batch(texts))
    for record in chunk:
      own = [next(ids) for part in record.parts if not isinstance(part, Medium)]
      laid.append(document_ids(record, own, tokenizer, slots))
      names.append(record.name)
      media.append([record.media.count(kind) for kind in KINDS])
      sizes.append(len(record.learnt.encode('utf-8')))
    progress.update(len(laid))
  progress.finish(len(laid))
  for field in Ids._fields:
    arrays = [getattr(ids, field) for ids in laid]
    dtype = bool if field == 'learnt' else np.int32
    np.save(folder / f'{field}.npy', np.concatenate([np.zeros(0, dtype), *arrays]))
  lengths = [len(ids.tokens) for ids in laid]
  np.save(folder / 'offsets.npy', np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
  np.save(folder / 'media.npy', np.array(media, np.int64).reshape(-1, len(KINDS)))
  np.save(folder / 'text_bytes.npy', np.array(sizes, np.int64))
  (folder / 'names.json').write_text(json.dumps(names), encoding='utf-8')
