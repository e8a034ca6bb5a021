"""From token ids to bytes, and from a stream of ids to text without half characters."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
import tokenizers.decoders


class ByteStream:
  """Turns ids into text one at a time; holds back the bytes of an unfinished character."""

  def __init__(self, pieces: Sequence[bytes]):
    """Starts a stream.

    Args:
      pieces: the bytes of each id; empty for special ids.
    """
    self._pieces = pieces
    self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

  def push(self, token: int) -> str:
    """The text that is complete after this id; may be empty.

    Raises:
      IndexError: the id is outside the vocabulary.
    """
    if not 0 <= token < len(self._pieces):
      raise IndexError(f'token id {token} is outside the vocabulary of {len(self._pieces)}')
    return self._decoder.decode(self._pieces[token])

  def finish(self) -> str:
    """What is left: U+FFFD where a character was never finished."""
    return self._decoder.decode(b'', final=True)


class PieceStream:
  """The same for vocabularies whose pieces are not bytes (SentencePiece style)."""

  def __init__(self, tokenizer: tokenizers.Tokenizer, specials: Iterable[int]):
    """Starts a stream.

    Args:
      tokenizer: whose decoder joins the pieces.
      specials: ids that give no text.
    """
    self._tokenizer = tokenizer
    self._specials = frozenset(specials)
    self._ids: list[int] = []
    self._emitted = ''

  def push(self, token: int) -> str:
    """The text that is complete after this id; may be empty.

    Raises:
      IndexError: the id is outside the vocabulary.
    """
    if self._tokenizer.id_to_token(token) is None:
      raise IndexError(f'token id {token} is outside the vocabulary')
    if token in self._specials:
      return ''
    self._ids.append(token)
    text = self._tokenizer.decode(self._ids, skip_special_tokens=False)
    return '' if text.endswith('\ufffd') else self._emit(text)

  def finish(self) -> str:
    """What was held back."""
    return self._emit(self._tokenizer.decode(self._ids, skip_special_tokens=False))

  def _emit(self, text: str) -> str:
    """The part of the text that was not given out yet."""
    fresh, self._emitted = text[len(self._emitted) :], text
    return fresh


def _alphabet() -> dict[str, int]:
  """The printable character that stands for each byte in byte-level vocabularies.

  Source: Radford et al. 2019 (GPT-2), section 2.2.
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [b for b in range(256) if b not in printable]
  table = {chr(b): b for b in printable}
  return table | {chr(256 + i): b for i, b in enumerate(others)}


def byte_vocabulary(specials: Sequence[str]) -> str:
  """Returns a tokenizer.json without merges: special ids first, then one a byte.

  Args:
    specials: texts of the special tokens, by id.
  """
  bytes_of = {character: len(specials) + byte for character, byte in _alphabet().items()}
  vocabulary = {text: index for index, text in enumerate(specials)} | bytes_of
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
  level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.pre_tokenizer = level
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(list(specials))
  return tokenizer.to_str(pretty=True)


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
  """Whether the decoder of a tokenizer.json maps characters to bytes."""
  if decoder is None:
    return False
  parts = decoder.get('decoders') if decoder['type'] == 'Sequence' else [decoder]
  return [part['type'] for part in parts or ()] == ['ByteLevel']


def piece_bytes(
  tokenizer: tokenizers.Tokenizer, description: dict[str, Any], specials: frozenset[int]
) -> tuple[bytes, ...] | None:
  """The bytes of every id of a byte-level vocabulary; None for other vocabularies.

  Args:
    tokenizer: the loaded tokenizer.
    description: its parsed JSON.
    specials: ids that give no text.
  """
  if not _is_byte_level(description.get('decoder')):
    return None
  alphabet = _alphabet()
  vocabulary = tokenizer.get_vocab(with_added_tokens=True)
  added = tokenizer.get_added_tokens_decoder()
  pieces = [b''] * (1 + max(vocabulary.values()))
  for piece, index in vocabulary.items():
    if index in specials:
      continue
    if index in added:
      pieces[index] = piece.encode('utf-8')
    else:
      pieces[index] = bytes(alphabet[character] for character in piece)
  return tuple(pieces)
