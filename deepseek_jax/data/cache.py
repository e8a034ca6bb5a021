"""Tokens of a split, computed once and kept on disk as memory-mapped arrays."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data import store
from deepseek_jax.data.document import Document
from deepseek_jax.data.progress import Progress
from deepseek_jax.data.source import AnySource
from deepseek_jax.data.split import Split
from deepseek_jax.data.tokenizer import Tokenizer

# Texts go to the tokenizer in lots of about this many characters: enough for all its threads, and
# little memory.
_LOT_CHARACTERS = 4_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenCache:
  """The tokens of one split; the arrays are read-only maps of files.

  Attributes:
    tokens: [N] uint16 or int32, every document as bos, its prompt's tokens, its text's tokens, eos,
      one after the other.
    offsets: [documents + 1] int64, where each document starts in `tokens`.
    text_bytes: [documents] int64, UTF-8 bytes of each document's text, without its prompt.
    given: [documents] int64, tokens at the start of each document that are no targets: bos and the
      prompt.
    titles: name of each document.
    sources: source of each document.
    fingerprint: hexadecimal hash of what decides all this.
  """

  tokens: np.ndarray
  offsets: np.ndarray
  text_bytes: np.ndarray
  given: np.ndarray
  titles: tuple[str, ...]
  sources: tuple[str, ...]
  fingerprint: str


def token_cache(
  source: AnySource, tokenizer: Tokenizer, split: Split, folder: pathlib.Path
) -> TokenCache:
  """The tokens of a split, from the store or computed now.

  Args:
    source: of the documents.
    tokenizer: what encodes them.
    split: 'train' or 'heldout'.
    folder: of the store.

  Raises:
    ConfigError: the source cannot be read, or the split holds no document.
  """
  parts = {'source': source.fingerprint(), 'tokenizer': tokenizer.fingerprint, 'split': split}
  name = store.key('tokens', parts)

  def build(scratch: pathlib.Path) -> dict[str, Any]:
    return _build(source.documents(split), tokenizer, split, scratch)

  entry = store.entry(folder, name, build)
  return TokenCache(
    tokens=entry.array('tokens'),
    offsets=entry.array('offsets'),
    text_bytes=entry.array('text_bytes'),
    given=entry.array('given'),
    titles=tuple(entry.meta['titles']),
    sources=tuple(entry.meta['sources']),
    fingerprint=hashlib.sha256(name.encode('utf-8')).hexdigest(),
  )


def _lots(documents: Iterable[Document]) -> Iterator[list[Document]]:
  """Groups documents into lots of about `_LOT_CHARACTERS`."""
  lot: list[Document] = []
  size = 0
  for document in documents:
    lot.append(document)
    size += len(document.prompt) + len(document.text)
    if size >= _LOT_CHARACTERS:
      yield lot
      lot, size = [], 0
  if lot:
    yield lot


def _build(
  documents: Iterable[Document], tokenizer: Tokenizer, split: Split, scratch: pathlib.Path
) -> dict[str, Any]:
  """Tokenizes the documents into files in `scratch`."""
  dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32)
  lengths, text_bytes, given, titles, sources = [], [], [], [], []
  progress = Progress(f'tokenizing {split}', 'tokens')
  raw = scratch / 'tokens.raw'
  total = 0
  with raw.open('wb') as stream:
    for lot in _lots(documents):
      # Apart from its text, as it will be when the text is yet to be written.
      prompts = tokenizer.encode_batch([d.prompt for d in lot])
      for document, prompt, ids in zip(lot, prompts, tokenizer.encode_batch([d.text for d in lot])):
        whole = np.concatenate([[tokenizer.bos], prompt, ids, [tokenizer.eos]]).astype(dtype)
        stream.write(whole.tobytes())
        total += len(whole)
        lengths.append(len(whole))
        given.append(1 + len(prompt))
        text_bytes.append(len(document.text.encode('utf-8')))
        titles.append(document.title)
        sources.append(document.source)
      progress.update(total)
  if not lengths:
    raise ConfigError(f'the {split} split has no document')
  # The length is only known now, and it stands in the header of a .npy file.
  tokens = np.lib.format.open_memmap(scratch / 'tokens.npy', mode='w+', dtype=dtype, shape=(total,))
  tokens[:] = np.memmap(raw, dtype=dtype, mode='r')
  tokens.flush()
  raw.unlink()
  np.save(scratch / 'offsets.npy', np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
  np.save(scratch / 'text_bytes.npy', np.array(text_bytes, np.int64))
  np.save(scratch / 'given.npy', np.array(given, np.int64))
  progress.finish(total)
  return {'titles': titles, 'sources': sources}
