"""A vocabulary of numbered symbols, for text that is made up."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.byte_pieces import ByteStream
from deepseek_jax.data.tokenizer import BOS, EOS, PAD, Tokenizer

SPECIALS = 3
"""Ids before the first symbol's: bos, eos and pad."""


class SymbolTokenizer(Tokenizer):
  """Symbol n, written as its number and a blank, is id 3 + n."""

  def __init__(self, count: int):
    """Makes the pieces of `count` symbols."""
    self.vocab_size = SPECIALS + count
    self.bos, self.eos, self.pad = BOS, EOS, PAD
    self.specials = frozenset((BOS, EOS, PAD))
    self.fingerprint = hashlib.sha256(f'symbols 1 {count}'.encode()).hexdigest()
    self._pieces = (b'',) * SPECIALS + tuple(f'{n} '.encode() for n in range(count))

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids [T] int32 of numbers with blanks between them.

    Raises:
      ConfigError: a word is no number of a symbol.
    """
    return [np.array([self._id(word) for word in text.split()], np.int32) for text in texts]

  def stream(self) -> ByteStream:
    """A decoder that takes one id at a time."""
    return ByteStream(self._pieces)

  def _id(self, word: str) -> int:
    count = self.vocab_size - SPECIALS
    if not (word.isdecimal() and int(word) < count):
      raise ConfigError(f'{word!r} is no symbol: expected a number from 0 to {count - 1}')
    return SPECIALS + int(word)


@dataclasses.dataclass(frozen=True)
class Symbols:
  """Numbered symbols.

  Attributes:
    count: how many.
  """

  count: int

  def build(self) -> SymbolTokenizer:
    """The tokenizer."""
    return SymbolTokenizer(self.count)
