"""Speech by espeak-ng, sentences of the corpus in several voices: pairs without end."""

import ctypes
import dataclasses
import functools
import re
import threading
from typing import NamedTuple

import numpy as np

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.data.media.made import Made, Maker, pick
from deepseek_jax.data.media.optional import need
from deepseek_jax.data.media.record import Form, Learnt, Medium, Part
from deepseek_jax.data.media.waveform import resample
from deepseek_jax.data.source import Embedded
from deepseek_jax.data.split import SPLITS, Split

VOICES = ('en-us', 'en-gb', 'en-gb-scotland', 'en-gb-x-rp')
VARIANTS = ('', '+f2', '+m3', '+f4')

# Constants of speak_lib.h, the header of espeak-ng.
_SYNCHRONOUS, _NO_EXIT, _UTF8, _CHARACTERS = 2, 0x8000, 1, 1
_RATE, _PITCH = 1, 3
_FASTEST = 450


class Utterance(NamedTuple):
  """A sentence and who says it.

  Attributes:
    text: the sentence.
    voice: name of the voice.
    pace: words a minute.
    pitch: from 0 to 100.
  """

  text: str
  voice: str
  pace: int
  pitch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speech(Maker[Utterance]):
  """Spoken sentences of Jane Austen with their text; needs espeak-ng (extra `speech`).

  A sentence is held out, not a voice.

  Attributes:
    rate: samples a second.
    seconds: longest sound; a sentence that would take longer is spoken faster.
    words: longest sentence.
    made: how many sounds, and which are held out.
  """

  rate: int = 16_000
  seconds: float = 4.0
  words: int = 8
  made: Made = Made()

  def __post_init__(self):
    errors = wrong_sizes(self, ('rate', 'words'))
    if not self.seconds > 0 or self.words > 2.5 * self.seconds:
      errors.append(
        f'`words` is {self.words} in {self.seconds} `seconds`; expected at most 2.5 a second'
      )
    if errors:
      raise ConfigError(errors)

  @property
  def forms(self) -> dict[str, Form]:
    """Sounds [at most N] float32 from -1 to 1."""
    return {'sound': Form(shape=(round(self.rate * self.seconds),), dtype='float32')}

  def open(self, cache_dir=None):
    """Makes the documents readable.

    Raises:
      ConfigError: espeak-ng is not installed.
    """
    need('espeakng_loader', 'Speech')
    return super().open(cache_dir)

  def draw(self, rng: np.random.Generator) -> Utterance:
    """Draws a sentence and a voice."""
    return Utterance(
      pick(rng, sentences(self.words)),
      pick(rng, VOICES) + pick(rng, VARIANTS),
      int(rng.integers(140, 190)),
      int(rng.integers(35, 65)),
    )

  def content(self, scene: Utterance) -> str:
    """The sentence without capitals and punctuation."""
    return ' '.join(re.findall(r"[a-z']+", scene.text.lower()))

  def parts(self, scene: Utterance) -> tuple[Part, ...]:
    """The sound, then what is said."""
    return Medium(modality='sound'), Learnt(text=scene.text)

  def facts(self, scene: Utterance) -> dict:
    """The words, and the voice."""
    return {'keywords': self.content(scene).split(), 'voice': scene.voice}

  def paint(self, scene: Utterance, rng: np.random.Generator, split: Split) -> list[np.ndarray]:
    """The sound [at most N] float32, from -1 to 1."""
    del split
    most = self.forms['sound'].shape[0]
    pace = scene.pace
    while True:
      wave, rate = speak(scene._replace(pace=pace))
      wave = resample(wave, rate, self.rate)
      if len(wave) <= most or pace >= _FASTEST:
        break
      pace = min(_FASTEST, round(1.2 * pace))
    peak = np.abs(wave).max()
    return [(wave[:most] * (rng.uniform(0.3, 0.9) / peak if peak else 1.0)).astype(np.float32)]


@functools.lru_cache(maxsize=4)
def sentences(words: int) -> tuple[str, ...]:
  """Different sentences of three to `words` words of the novels in the package."""
  found: dict[str, None] = {}
  for split in SPLITS:
    for document in Embedded(sources=('austen',)).documents(split):
      for text in re.findall(r"(?<=[.!?] )[A-Z][A-Za-z', ]+[.!?](?=\s)", document.text):
        if 3 <= len(text.split()) <= words:
          found.setdefault(text)
  return tuple(found)


class _Engine:
  """The one espeak-ng of a process; it keeps its state in globals, so callers take turns."""

  def __init__(self):
    need('espeakng_loader', 'Speech')
    import espeakng_loader

    self.lock = threading.Lock()
    self.library = ctypes.CDLL(espeakng_loader.get_library_path())
    path = str(espeakng_loader.get_data_path()).encode()
    self.rate = self.library.espeak_Initialize(_SYNCHRONOUS, 0, path, _NO_EXIT)
    if self.rate <= 0:
      raise ConfigError(f'Speech: espeak-ng could not read its data at {path.decode()}')
    self.chunks: list[np.ndarray] = []
    kind = ctypes.CFUNCTYPE(
      ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
    )
    # Kept, since the library holds a pointer to it only.
    self.callback = kind(self._take)
    self.library.espeak_SetSynthCallback(self.callback)

  def _take(self, samples, count: int, events) -> int:
    del events
    if samples and count > 0:
      self.chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
    return 0

  def say(self, utterance: Utterance) -> np.ndarray:
    """The samples [N] int16 of an utterance."""
    text = utterance.text.encode('utf-8')
    with self.lock:
      self.chunks.clear()
      if self.library.espeak_SetVoiceByName(utterance.voice.encode()):
        raise ConfigError(f'Speech: espeak-ng has no voice {utterance.voice}')
      self.library.espeak_SetParameter(_RATE, utterance.pace, 0)
      self.library.espeak_SetParameter(_PITCH, utterance.pitch, 0)
      self.library.espeak_Synth(
        text, ctypes.c_size_t(len(text) + 1), 0, _CHARACTERS, 0, _UTF8, None, None
      )
      return np.concatenate(self.chunks) if self.chunks else np.zeros(0, np.int16)


@functools.cache
def _engine() -> _Engine:
  return _Engine()


def speak(utterance: Utterance) -> tuple[np.ndarray, int]:
  """Speaks: the waveform [N] float64 from -1 to 1, and its samples a second.

  Raises:
    ConfigError: espeak-ng is not installed, or has no such voice.
  """
  engine = _engine()
  return engine.say(utterance) / 32768, engine.rate
