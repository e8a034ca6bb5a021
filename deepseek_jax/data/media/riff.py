"""WAV files without a library: whole numbers of 8 to 32 bits and floats, any number of channels."""

import struct

import numpy as np

from deepseek_jax.data.media.record import UnreadableError

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
# What programs write that do not know the length beforehand.
_UNKNOWN = 0xFFFFFFFF


def is_riff(data: bytes) -> bool:
  """Whether it says of itself that it is a WAV file."""
  return data[:4] == b'RIFF' and data[8:12] == b'WAVE'


def _chunks(data: bytes) -> dict[bytes, tuple[int, int]]:
  """Start and stated size of each chunk, the first of each name."""
  found: dict[bytes, tuple[int, int]] = {}
  at = 12
  while at + 8 <= len(data):
    name, size = struct.unpack_from('<4sI', data, at)
    found.setdefault(name, (at + 8, size))
    at += 8 + size + size % 2
  return found


def read_riff(data: bytes) -> tuple[np.ndarray, int]:
  """A WAV file's samples [N, C] float64, from -1 to 1, and how many a second.

  Raises:
    UnreadableError: it is cut short, or of a format that needs a library.
  """
  chunks = _chunks(data)
  if b'fmt ' not in chunks or b'data' not in chunks or chunks[b'fmt '][1] < 16:
    raise UnreadableError('cut short: a WAV file without format or samples')
  at = chunks[b'fmt '][0]
  if len(data) < at + 16:
    raise UnreadableError('cut short: a WAV file that ends in its format')
  form, channels, rate, _, block, bits = struct.unpack_from('<HHIIHH', data, at)
  if form == _EXTENSIBLE and chunks[b'fmt '][1] >= 26:
    (form,) = struct.unpack_from('<H', data, at + 24)
  start, size = chunks[b'data']
  there = len(data) - start
  if size == _UNKNOWN:
    size = there
  if size > there:
    raise UnreadableError(f'cut short: {there} bytes of samples where {size} are announced')
  if not channels or bits not in (8, 16, 24, 32, 64) or block != channels * bits // 8:
    raise UnreadableError(
      f'a damaged WAV header: {channels} channels, {bits} bits, blocks of {block}'
    )
  if form not in (_PCM, _FLOAT):
    raise UnreadableError(f'a WAV file of format {form} with {bits} bits')
  raw = data[start : start + size - size % block]
  return _samples(raw, form, bits).reshape(-1, channels), rate


def _samples(raw: bytes, form: int, bits: int) -> np.ndarray:
  """Bytes as samples [N · C] float64."""
  if form == _FLOAT:
    if bits not in (32, 64):
      raise UnreadableError(f'a WAV file of floats with {bits} bits')
    return np.frombuffer(raw, f'<f{bits // 8}').astype(np.float64)
  if bits == 8:
    # Only samples of one byte are unsigned.
    return (np.frombuffer(raw, np.uint8).astype(np.float64) - 128) / 128
  if bits == 24:
    three = np.frombuffer(raw, np.uint8).reshape(-1, 3).astype(np.int32)
    value = three[:, 0] << 8 | three[:, 1] << 16 | three[:, 2] << 24
    return value / 2**31
  return np.frombuffer(raw, f'<i{bits // 8}').astype(np.float64) / 2 ** (bits - 1)
