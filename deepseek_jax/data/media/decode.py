"""Files to arrays: pictures, sounds, clips and clouds as people have them, in one form each.

Whatever is wrong with a file is an `UnreadableError` that says what; whatever can be read right is:
colours of every mode, sounds of every depth and number of channels.
"""

import dataclasses
import io
import pathlib
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.data.media.mesh import read_points
from deepseek_jax.data.media.optional import need
from deepseek_jax.data.media.record import Form, UnreadableError
from deepseek_jax.data.media.riff import is_riff, read_riff
from deepseek_jax.data.media.waveform import mono, resample

EXTENSIONS = {
  'image': ('png', 'jpg', 'jpeg', 'jfif', 'webp', 'gif', 'bmp', 'tif', 'tiff', 'ppm', 'pgm'),
  'video': ('mp4', 'm4v', 'mov', 'mkv', 'webm', 'avi', 'mpg', 'mpeg'),
  'sound': ('wav', 'flac', 'ogg', 'oga', 'mp3', 'aif', 'aiff', 'au'),
  'points': ('ply', 'obj', 'stl', 'off', 'glb', 'npy'),
}
"""Endings of the names of files of each kind."""

_FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM')
# Softer than the noise of 16 bits.
_SILENT = 1e-4

# Pillow warns of what is handled here; filters of warnings belong to the whole process.
_QUIET = threading.Lock()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What media are brought to, so that they fit in one array.

  Attributes:
    side: S, pixels of a side of a picture or clip; others are shrunk or enlarged and centred on
      white.
    frames: F, pictures of a clip, evenly spread over its time.
    rate: samples a second of a sound.
    seconds: of a sound, from its beginning; shorter ones stay so.
    points: P, of a cloud.
    most_pixels: a picture with more, or a clip with more in a frame, is left out undecoded.
  """

  side: int = 64
  frames: int = 8
  rate: int = 16_000
  seconds: float = 2.0
  points: int = 512
  most_pixels: int = 50_000_000

  def __post_init__(self):
    names = ('side', 'frames', 'rate', 'points', 'most_pixels')
    errors = wrong_sizes(self, names)
    if not self.seconds > 0:
      errors.append(f'`seconds` is {self.seconds}; expected above 0')
    if errors:
      raise ConfigError(errors)

  def forms(self, kinds: tuple[str, ...]) -> dict[str, Form]:
    """What the arrays of some kinds are."""
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
      'image': ((self.side, self.side, 3), 'uint8'),
      'video': ((self.frames, self.side, self.side, 3), 'uint8'),
      'sound': ((round(self.rate * self.seconds),), 'float32'),
      'points': ((self.points, 6), 'float32'),
    }
    return {k: Form(shape=shapes[k][0], dtype=shapes[k][1]) for k in shapes if k in kinds}


def kind_of(name: str) -> str | None:
  """The kind of a file by the ending of its name; None if it is none of ours."""
  ending = pathlib.PurePosixPath(name).suffix[1:].lower()
  return next((kind for kind, endings in EXTENSIONS.items() if ending in endings), None)


def decode(kind: str, name: str, data: bytes, sizes: Sizes) -> np.ndarray:
  """A file of a kind as an array of its form.

  Args:
    kind: 'image', 'video', 'sound' or 'points'.
    name: of the file; of clouds its ending says the format.
    data: the content.
    sizes: what it is brought to.

  Raises:
    UnreadableError: it cannot be used; says why.
    ConfigError: a library for it is not installed.
  """
  if not data:
    raise UnreadableError('an empty file')
  try:
    return _DECODERS[kind](name, data, sizes)
  except (UnreadableError, ConfigError):
    raise
  except Exception as error:  # whatever a library raises on damaged files, and they raise anything
    # A library may name the object that it read from, which says nothing.
    text = ' '.join(re.sub(r'<_io[^>]*>', '', str(error)).split())[:200]
    raise UnreadableError(f'not a readable {kind}: {type(error).__name__}: {text}') from error


def decode_image(name: str, data: bytes, sizes: Sizes) -> np.ndarray:
  """A picture [S, S, 3] uint8: the first of an animation, upright, on white."""
  del name
  from PIL import Image, ImageOps  # here, because only pictures need it

  with _QUIET, warnings.catch_warnings():
    warnings.simplefilter('ignore')
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
      _check_pixels(image.width, image.height, sizes)
      # A JPEG can be decoded at a fraction of its size, which is much faster.
      image.draft(None, (2 * sizes.side, 2 * sizes.side))
      image.load()
      upright = ImageOps.exif_transpose(image)
      return letterbox(opaque(upright), sizes.side)


def _check_pixels(width: int, height: int, sizes: Sizes) -> None:
  if width * height > sizes.most_pixels:
    raise UnreadableError(f'{width} × {height} pixels, more than {sizes.most_pixels} are allowed')


def opaque(image: Any) -> Any:
  """A picture of any mode as one of red, green and blue, seen on white.

  Raises:
    UnreadableError: nothing of it can be seen, or its numbers are not colours.
  """
  from PIL import Image

  if image.mode.startswith('I') or image.mode == 'F':
    return Image.fromarray(_eight_bits(np.asarray(image), image.mode)).convert('RGB')
  if image.mode not in ('RGBA', 'LA', 'PA', 'La', 'RGBa') and 'transparency' not in image.info:
    return image.convert('RGB')
  image = image.convert('RGBA')
  if image.getextrema()[3][1] == 0:
    raise UnreadableError('fully transparent')
  white = Image.new('RGBA', image.size, (255, 255, 255, 255))
  return Image.alpha_composite(white, image).convert('RGB')


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
  """Greys [H, W] of 16 bits, or floats from 0 to 1, as uint8; a plain conversion would cut them."""
  values = values.astype(np.float64)
  if not np.isfinite(values).all():
    raise UnreadableError('numbers that are not finite')
  low, high, most = values.min(), values.max(), 1 if mode == 'F' else 65535
  if low < 0 or high > most:
    raise UnreadableError(f'greys from {low:g} to {high:g}, expected 0 to {most}')
  return np.rint(values * (255 / most)).astype(np.uint8)


def letterbox(image: Any, side: int) -> np.ndarray:
  """An RGB picture of any size as [S, S, 3] uint8, whole, in the middle of white."""
  from PIL import Image

  scale = side / max(image.size)
  width, height = (max(1, round(scale * size)) for size in image.size)
  small = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
  canvas = np.full((side, side, 3), 255, np.uint8)
  top, left = (side - height) // 2, (side - width) // 2
  canvas[top : top + height, left : left + width] = np.asarray(small)
  return canvas


def decode_sound(name: str, data: bytes, sizes: Sizes) -> np.ndarray:
  """A sound [at most N] float32 from -1 to 1, all channels in one."""
  del name
  wave, rate = _read_sound(data)
  if not 1000 <= rate <= 1_000_000:
    raise UnreadableError(f'{rate} samples a second, expected 1,000 to 1,000,000')
  # More than is kept, so that the filter of another rate sees no edge.
  wave = wave[: round((sizes.seconds + 0.1) * rate)]
  if len(wave) < 16:
    raise UnreadableError(f'{len(wave)} samples, too few to hear')
  if not np.isfinite(wave).all():
    raise UnreadableError('samples that are not finite')
  peak = np.abs(wave).max()
  one = mono(wave)
  if np.abs(one).max() < 1e-3 * peak:
    # Two channels that are each other's opposite would be silence.
    one = wave[:, 0]
  most = round(sizes.rate * sizes.seconds)
  result = resample(one, rate, sizes.rate)[:most]
  if np.abs(result).max() < _SILENT:
    raise UnreadableError(f'silent in its first {sizes.seconds:g} seconds')
  return (result / max(1.0, np.abs(result).max())).astype(np.float32)


def _read_sound(data: bytes) -> tuple[np.ndarray, int]:
  """Samples [N, C] float64 and how many a second."""
  if is_riff(data):
    return read_riff(data)
  need('soundfile', 'a sound other than WAV')
  import soundfile

  wave, rate = soundfile.read(io.BytesIO(data), dtype='float64', always_2d=True)
  return wave, int(rate)


def decode_video(name: str, data: bytes, sizes: Sizes) -> np.ndarray:
  """A clip [at most F, S, S, 3] uint8, its pictures evenly spread over its time."""
  del name
  need('av', 'video')
  import av

  with av.open(io.BytesIO(data)) as container:
    times, unit = _frame_times(container)
    announced = (container.duration or 0) / av.time_base
  begin, last = times[0] * unit, times[-1] * unit
  if announced and len(times) > 1 and last - begin < 0.5 * announced:
    raise UnreadableError(f'cut short: {last - begin:.2f} of {announced:.2f} seconds')
  # The picture that is shown in the middle of each of F equal parts, whatever the frame rate.
  step = (last - begin) / max(len(times) - 1, 1)
  wanted = begin + (np.arange(sizes.frames) + 0.5) * (last - begin + step) / sizes.frames
  chosen = np.searchsorted(np.array(times) * unit, wanted + 1e-6, side='right') - 1
  chosen = np.unique(chosen) if len(times) < sizes.frames else chosen
  wanted_times = {times[i] for i in chosen}
  pictures: dict[int, np.ndarray] = {}
  with av.open(io.BytesIO(data)) as container:
    for frame in container.decode(video=0):
      _check_pixels(frame.width, frame.height, sizes)
      if frame.pts in wanted_times:
        pictures[frame.pts] = letterbox(frame.to_image(), sizes.side)
  found = [pictures[times[i]] for i in chosen if times[i] in pictures]
  if len(found) < len(chosen):
    raise UnreadableError(f'{len(chosen) - len(found)} of {len(chosen)} frames cannot be decoded')
  return np.stack(found)


def _frame_times(container: Any) -> tuple[list[int], float]:
  """When each frame is shown, in order, and the unit of that in seconds; nothing is decoded."""
  if not container.streams.video:
    raise UnreadableError('no video in it')
  stream = container.streams.video[0]
  times = sorted({p.pts for p in container.demux(stream) if p.pts is not None and p.size})
  if not times:
    raise UnreadableError('a video without frames')
  return times, float(stream.time_base)


def decode_points(name: str, data: bytes, sizes: Sizes) -> np.ndarray:
  """A cloud [P, 6] float32: coordinates in a ball of radius 1, colours from 0 to 1."""
  return read_points(pathlib.PurePosixPath(name).suffix[1:].lower(), data, sizes.points)


_DECODERS: dict[str, Callable[[str, bytes, Sizes], np.ndarray]] = {
  'image': decode_image,
  'video': decode_video,
  'sound': decode_sound,
  'points': decode_points,
}
