"""Opens plain, gzip, xz and Zstandard files for reading; notices every damaged or cut archive."""

import contextlib
import gzip
import importlib
import io
import lzma
import pathlib
import zlib
from collections.abc import Iterator
from typing import IO, Any

from deepseek_jax.core.config import ConfigError

PACKINGS = ('.gz', '.xz', '.zst')

_CHUNK_BYTES = 1 << 16


class _ZstdStream(io.RawIOBase):
  """Zstandard frames as one stream of bytes.

  The library's own reader gives the rest of a file that was cut as if it had ended there.
  """

  def __init__(self, packed: IO[bytes], zstandard: Any):
    self._packed, self._zstandard = packed, zstandard
    self._frame = zstandard.ZstdDecompressor().decompressobj()
    self._input = self._output = b''

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._output:
      chunk = self._input or self._packed.read(_CHUNK_BYTES)
      if not chunk:
        if not self._frame.eof:
          raise EOFError('it ends in the middle of a frame')
        return 0
      if self._frame.eof:
        self._frame = self._zstandard.ZstdDecompressor().decompressobj()
      self._output = self._frame.decompress(chunk)
      self._input = self._frame.unused_data if self._frame.eof else b''
    count = min(len(buffer), len(self._output))
    buffer[:count], self._output = self._output[:count], self._output[count:]
    return count


@contextlib.contextmanager
def unpacked(path: pathlib.Path) -> Iterator[IO[bytes]]:
  """Opens a file for reading bytes; what is packed by its ending is unpacked on the way.

  Raises:
    ConfigError: the archive is damaged, or reading it needs a package that is not there.
  """
  packing = path.suffix.lower()
  damaged: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
  with contextlib.ExitStack() as stack:
    stream: Any = stack.enter_context(path.open('rb'))
    if packing == '.gz':
      stream = stack.enter_context(gzip.open(stream, 'rb'))
    elif packing == '.xz':
      stream = stack.enter_context(lzma.open(stream, 'rb'))
    elif packing == '.zst':
      zstandard = _zstandard(path)
      damaged = (*damaged, zstandard.ZstdError)
      stream = io.BufferedReader(_ZstdStream(stream, zstandard))
    try:
      yield stream
    except damaged as error:
      raise ConfigError(f'{path}: the {packing} archive is damaged: {error}') from error


def _zstandard(path: pathlib.Path) -> Any:
  """The library for .zst."""
  try:
    return importlib.import_module('zstandard')
  except ImportError as error:
    raise ConfigError(f'{path}: reading .zst needs the package zstandard') from error
