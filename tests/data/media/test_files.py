"""Files as people have them: what can be read is read right, all else is left out and listed.

Every medium has its own name for a caption, so that a caption that slips to another row is seen.
"""

import io
import json
import re
import struct
import wave
import zlib

import numpy as np
import pytest
from PIL import Image

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.media.decode import Sizes
from deepseek_jax.data.media.files import fault_table
from deepseek_jax.data.media.folder import MediaFolder

RED, BLUE, WHITE = (230, 20, 20), (20, 20, 230), (255, 255, 255)
SIZES = Sizes(side=16, rate=8000, seconds=0.5, points=64, frames=4, most_pixels=1_000_000)


def flag(size=(32, 32)) -> Image.Image:
  """Red on the left, blue on the right."""
  image = Image.new('RGB', size, RED)
  image.paste(BLUE, (size[0] // 2, 0, *size))
  return image


def saved(image: Image.Image, form: str, **options) -> bytes:
  """The file of a picture."""
  stream = io.BytesIO()
  image.save(stream, form, **options)
  return stream.getvalue()


def rotated() -> bytes:
  """A flag lying on its side, with the note that says how to turn it."""
  exif = Image.Exif()
  exif[0x0112] = 6
  return saved(flag().transpose(Image.Transpose.ROTATE_90), 'JPEG', exif=exif, quality=95)


def half_transparent() -> bytes:
  """Red on the left, nothing on the right."""
  image = flag().convert('RGBA')
  image.paste((0, 0, 0, 0), (16, 0, 32, 32))
  return saved(image, 'PNG')


def palette_with_hole() -> bytes:
  """A palette one of whose colours is transparent."""
  return saved(flag().quantize(4), 'PNG', transparency=flag().quantize(4).getpixel((30, 5)))


def huge() -> bytes:
  """A tiny PNG that unpacks to 900 million pixels."""

  def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))

  header = struct.pack('>IIBBBBB', 30_000, 30_000, 1, 0, 0, 0, 0)
  body = zlib.compress(bytes(1000))
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', body) + chunk(b'IEND', b'')


def frames(form: str) -> bytes:
  """An animation: the flag, then green."""
  rest = [Image.new('RGB', (32, 32), (0, 255, 0))] * 2
  return saved(flag(), form, save_all=True, append_images=rest, duration=50)


PNG, JPEG = saved(flag(), 'PNG'), saved(flag((64, 64)), 'JPEG', quality=95)
NOISE = saved(Image.effect_noise((64, 64), 90).convert('RGB'), 'PNG')
GREY16 = np.full((32, 32), 12_850, np.uint16)
GREY16[:, 16:] = 51_400

# Name -> (content, colours of the left and the right half).
PICTURES = {
  'plain.png': (PNG, RED, BLUE),
  'plain.jpg': (JPEG, RED, BLUE),
  'plain.webp': (saved(flag(), 'WEBP', lossless=True), RED, BLUE),
  'plain.bmp': (saved(flag(), 'BMP'), RED, BLUE),
  'plain.tif': (saved(flag(), 'TIFF', compression='tiff_lzw'), RED, BLUE),
  'large.jpeg': (saved(flag((600, 600)), 'JPEG', quality=95), RED, BLUE),
  'cmyk.jpg': (saved(flag().convert('CMYK'), 'JPEG', quality=95), RED, BLUE),
  'cmyk.tiff': (saved(flag().convert('CMYK'), 'TIFF'), RED, BLUE),
  'sixteen.png': (saved(Image.fromarray(GREY16), 'PNG'), (50,) * 3, (200,) * 3),
  'sixteen.tif': (saved(Image.fromarray(GREY16), 'TIFF'), (50,) * 3, (200,) * 3),
  'float.tif': (
    saved(Image.fromarray((GREY16 / 65535).astype(np.float32)), 'TIFF'),
    (50,) * 3,
    (200,) * 3,
  ),
  'palette.png': (saved(flag().quantize(4), 'PNG'), RED, BLUE),
  'palette.gif': (saved(flag().quantize(4), 'GIF'), RED, BLUE),
  'hole.png': (palette_with_hole(), RED, WHITE),
  'animated.gif': (frames('GIF'), RED, BLUE),
  'animated.webp': (frames('WEBP'), RED, BLUE),
  'animated.png': (frames('PNG'), RED, BLUE),
  'turned.jpg': (rotated(), RED, BLUE),
  'alpha.png': (half_transparent(), RED, WHITE),
  'grey_alpha.png': (saved(Image.new('LA', (8, 8), (0, 0)), 'PNG'), None, None),
  'black_white.png': (saved(Image.fromarray(GREY16 > 30_000), 'PNG'), (0,) * 3, WHITE),
  'single.png': (saved(Image.new('RGB', (1, 1), RED), 'PNG'), RED, RED),
  'narrow.png': (saved(Image.new('RGB', (1, 4000), RED), 'PNG'), None, None),
  'other_name.jpg': (PNG, RED, BLUE),
  'SHOUTING.PNG': (PNG, RED, BLUE),
  'naïve ß 漢字 😀.png': (PNG, RED, BLUE),
  'deep/er/plain.png': (PNG, RED, BLUE),
}
del PICTURES['grey_alpha.png']

# Name -> (content, what the reason must have in it).
BROKEN_PICTURES = {
  'empty.png': (b'', 'an empty file'),
  'cut.png': (NOISE[: len(NOISE) // 2], 'truncated|broken'),
  'cut.jpg': (JPEG[: len(JPEG) // 2], '[Tt]runcated'),
  'head.png': (PNG[:20], 'not a readable image'),
  'text.png': (b'this is no picture', 'cannot identify'),
  'zeros.jpg': (bytes(500), 'cannot identify'),
  'flipped.png': (NOISE[:80] + bytes(200) + NOISE[280:], 'not a readable image'),
  'huge.png': (huge(), '30000 × 30000 pixels, more than 1000000|bomb'),
  'invisible.png': (saved(Image.new('RGBA', (8, 8), (9, 9, 9, 0)), 'PNG'), 'fully transparent'),
  'invisible_grey.png': (saved(Image.new('LA', (8, 8), (0, 0)), 'PNG'), 'fully transparent'),
  'nan.tif': (saved(Image.fromarray(np.full((4, 4), np.nan, np.float32)), 'TIFF'), 'finite'),
  'bright.tif': (saved(Image.fromarray(np.full((4, 4), 7, np.float32)), 'TIFF'), 'greys from 7'),
  'minus.tif': (saved(Image.fromarray(np.full((4, 4), -3, np.int32)), 'TIFF'), 'greys from -3'),
}


def wav(samples: np.ndarray, width: int, rate: int = 8000) -> bytes:
  """A WAV file of whole numbers: samples [N, C] from -1 to 1."""
  stream = io.BytesIO()
  samples = samples[:, None] if samples.ndim == 1 else samples
  if width == 1:
    raw = (np.rint(samples * 127) + 128).astype(np.uint8).tobytes()
  else:
    whole = np.rint(samples * (2.0 ** (8 * width - 1) - 1)).astype('<i8')
    raw = whole[..., None].view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
  with wave.open(stream, 'wb') as file:
    file.setnchannels(samples.shape[1])
    file.setsampwidth(width)
    file.setframerate(rate)
    file.writeframes(raw)
  return stream.getvalue()


def float_wav(samples: np.ndarray, rate: int = 8000) -> bytes:
  """A WAV file of 32-bit floats, one channel."""
  raw = samples.astype('<f4').tobytes()
  form = struct.pack('<HHIIHH', 3, 1, rate, 4 * rate, 4, 32)
  body = b'WAVEfmt ' + struct.pack('<I', 16) + form + b'data' + struct.pack('<I', len(raw)) + raw
  return b'RIFF' + struct.pack('<I', len(body)) + body


def sine(rate: int = 8000, seconds: float = 0.4, hertz: float = 440.0) -> np.ndarray:
  """A tone [N]."""
  return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


TONE = sine()
FIVE_ONE = np.stack([TONE] * 6, axis=1)
NAN = TONE.copy()
NAN[100] = np.nan
SOUNDS = {
  'sixteen.wav': wav(TONE, 2),
  'eight.wav': wav(TONE, 1),
  'twenty_four.wav': wav(TONE, 3),
  'thirty_two.wav': wav(TONE, 4),
  'float.wav': float_wav(TONE),
  'stereo.wav': wav(FIVE_ONE[:, :2], 2),
  'five_one.wav': wav(FIVE_ONE, 3),
  'opposite.wav': wav(np.stack([TONE, -TONE], axis=1), 2),
  'fast.wav': wav(sine(44_100), 2, 44_100),
  'slow.wav': wav(sine(6000), 2, 6000),
  'long.wav': wav(sine(seconds=3.0), 2),
  'unknown_length.wav': wav(TONE, 2)[:40] + b'\xff\xff\xff\xff' + wav(TONE, 2)[44:],
}
BROKEN_SOUNDS = {
  'silent.wav': (wav(np.zeros(4000), 2), 'silent in its first 0.5 seconds'),
  'silent_start.wav': (wav(np.concatenate([np.zeros(8000), TONE]), 2), 'silent in its first'),
  'nan.wav': (float_wav(NAN), 'not finite'),
  'infinite.wav': (float_wav(np.full(4000, np.inf)), 'not finite'),
  'no_samples.wav': (wav(np.zeros(0), 2), '0 samples, too few'),
  'click.wav': (wav(TONE[:8], 2), '8 samples, too few'),
  'cut.wav': (wav(TONE, 2)[:1000], 'cut short: 956 bytes of samples where 6400'),
  'head.wav': (wav(TONE, 2)[:30], 'cut short'),
  'no_channels.wav': (wav(TONE, 2)[:22] + b'\0\0' + wav(TONE, 2)[24:], 'damaged WAV header'),
  'no_rate.wav': (wav(TONE, 2)[:24] + bytes(4) + wav(TONE, 2)[28:], '0 samples a second'),
  'adpcm.wav': (wav(TONE, 2)[:20] + b'\2\0' + wav(TONE, 2)[22:], 'a WAV file of format 2'),
}


def array(values: np.ndarray) -> bytes:
  """The file of an array."""
  stream = io.BytesIO()
  np.save(stream, values)
  return stream.getvalue()


CORNERS = np.random.default_rng(0).uniform(-5, 9, (50, 3))
CLOUDS = {
  'plain.npy': array(CORNERS),
  'coloured.npy': array(np.concatenate([CORNERS, np.full((50, 3), 0.25)], axis=1)),
  'whole.npy': array((10 * CORNERS).astype(np.int16)),
}
BROKEN_CLOUDS = {
  'nan.npy': (array(np.where(CORNERS > 8, np.nan, CORNERS)), 'not finite'),
  'one_place.npy': (array(np.ones((50, 3))), 'all points are in one place'),
  'few.npy': (array(CORNERS[:3]), '3 points, too few'),
  'flat.npy': (array(CORNERS[:, :2]), r'expected numbers \[n, 3 or 6\]'),
  'words.npy': (array(np.array([['a', 'b', 'c']] * 9)), 'expected numbers'),
  'cut.npy': (array(CORNERS)[:300], 'not a readable points'),
}


def filled(folder, files: dict) -> None:
  """Writes files, each with its own name for a caption."""
  for name, content in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content[0] if isinstance(content, tuple) else content)
    # One file of captions: many names differ in their endings only.
    with (folder / 'captions.jsonl').open('a', encoding='utf-8') as lines:
      lines.write(json.dumps({'file': name, 'caption': f'this is {name}'}) + '\n')


def opened(folder, kind: str, good, broken) -> dict:
  """Opens a folder; every file is read or listed. Returns arrays by name."""
  filled(folder, {**good, **broken})
  source = MediaFolder(str(folder), kinds=(kind,), sizes=SIZES, heldout_fraction=0.2)
  records = source.open(folder / '.cache')
  arrays = {}
  for split in ('train', 'heldout'):
    assert records.count(split)
    for index in range(records.count(split)):
      record = records.record(split, index)
      assert record.learnt == f'this is {record.name}'
      assert record.media == (kind,)
      (arrays[record.name],) = records.render(split, index)
  reasons = {fault.name: fault.reason for fault in records.faults}
  assert sorted(reasons) == sorted(broken)
  for name, (_, reason) in broken.items():
    assert re.search(reason, reasons[name]), (name, reasons[name])
  assert sorted(arrays) == sorted(good)
  form = source.forms[kind]
  for values in arrays.values():
    assert values.dtype == form.dtype
    assert values.shape[1:] == form.shape[1:]
    assert 0 < len(values) <= form.shape[0]
  assert len(fault_table(records.faults).splitlines()) > len(broken)
  return arrays


def test_pictures(tmp_path):
  """Colours are right in every mode, whatever the name says."""
  arrays = opened(tmp_path, 'image', {n: c[0] for n, c in PICTURES.items()}, BROKEN_PICTURES)
  for name, (_, left, right) in PICTURES.items():
    if left is not None:
      halves = arrays[name][:, :6], arrays[name][:, -6:]
      for half, colour in zip(halves, (left, right)):
        np.testing.assert_allclose(half.mean(axis=(0, 1)), colour, atol=12, err_msg=name)
  assert (arrays['narrow.png'] == 255).all(axis=2).sum() == 16 * 15


def test_sounds(tmp_path):
  """The tone is where it was, at any depth, rate and number of channels."""
  arrays = opened(tmp_path, 'sound', SOUNDS, BROKEN_SOUNDS)
  for name, values in arrays.items():
    middle = values[600:2600]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(2000)))
    assert abs(np.argmax(spectrum) * 4 - 440) <= 4, name
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.02), name
  assert len(arrays['long.wav']) == 4000
  assert len(arrays['fast.wav']) == pytest.approx(3200, abs=1)
  assert sum(len(values) == 3200 for values in arrays.values()) >= 9


def test_clouds(tmp_path):
  """All fit in a ball of radius 1; colours stay."""
  arrays = opened(tmp_path, 'points', CLOUDS, BROKEN_CLOUDS)
  for values in arrays.values():
    assert np.linalg.norm(values[:, :3], axis=1).max() == pytest.approx(1, abs=1e-6)
  assert (arrays['coloured.npy'][:, 3:] == 0.25).all()
  assert (arrays['plain.npy'][:, 3:] == 0.5).all()


def test_there_are_enough_cases():
  """The tables of this file, and those of captions."""
  broken = [BROKEN_PICTURES, BROKEN_SOUNDS, BROKEN_CLOUDS]
  assert sum(map(len, broken)) >= 30
  assert sum(map(len, [PICTURES, SOUNDS, CLOUDS, *broken])) >= 65


def test_a_file_that_is_gone(tmp_path):
  """It is known when it is read, and says so; a changed folder is looked at anew."""
  filled(tmp_path, {name: PICTURES[name] for name in ('plain.png', 'plain.bmp', 'hole.png')})
  source = MediaFolder(str(tmp_path), sizes=SIZES, heldout_fraction=0.3)
  records = source.open(tmp_path / '.cache')
  before = source.fingerprint()
  name = records.record('train', 0).name
  (tmp_path / name).unlink()
  with pytest.raises(Exception, match=f'{name}: No such file'):
    records.render('train', 0)
  assert source.fingerprint() != before
  again = source.open(tmp_path / '.cache')
  assert [(f.name, f.reason) for f in again.faults] == [
    (name, 'has a caption, but there is no such file')
  ]


def test_nothing_usable(tmp_path):
  filled(tmp_path, {'text.png': BROKEN_PICTURES['text.png']})
  with pytest.raises(ConfigError, match=r'0 captioned media can be used(.|\n)*  text.png: not a'):
    MediaFolder(str(tmp_path)).open(tmp_path / '.cache')
  with pytest.raises(ConfigError, match='is no folder'):
    MediaFolder(str(tmp_path / 'nowhere')).open(tmp_path / '.cache')
