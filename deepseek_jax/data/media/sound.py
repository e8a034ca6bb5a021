"""Tones, chords, runs and rhythms of instrument-like timbres, and what is played."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.data.media.made import NUMBERS, Made, Maker, article, pick
from deepseek_jax.data.media.record import Form, Learnt, Medium, Part
from deepseek_jax.data.split import Split

PITCHES = ('C', 'C sharp', 'D', 'D sharp', 'E', 'F', 'F sharp', 'G', 'G sharp', 'A', 'A sharp', 'B')
OCTAVES = (3, 4, 5)
QUALITIES = {'major': (0, 4, 7), 'minor': (0, 3, 7), 'diminished': (0, 3, 6)}
"""Semitones of the notes of a chord above its root."""

SPACING = {'slow': 0.15, 'fast': 0.075}
"""From one beat to the next, in lengths of the whole sound."""


class Timbre(NamedTuple):
  """How an instrument sounds.

  Attributes:
    ratios: frequencies of the partials over the pitch.
    levels: amplitude of each.
    attack: seconds until it is loudest.
    decay: seconds in which it falls to 1 / e, or 0 for a tone that is held.
    vibrato: depth of a slow change of pitch, as a share of it.
  """

  ratios: tuple[float, ...]
  levels: tuple[float, ...]
  attack: float
  decay: float = 0.0
  vibrato: float = 0.0


def _harmonics(count: int, power: float, step: int = 1) -> dict[str, Any]:
  ratios = tuple(float(k) for k in range(1, count + 1, step))
  return {'ratios': ratios, 'levels': tuple(k**-power for k in ratios)}


INSTRUMENTS = {
  'flute': Timbre((1.0, 2.0, 3.0), (1.0, 0.2, 0.06), attack=0.08, vibrato=0.004),
  'organ': Timbre(**_harmonics(8, 0.6), attack=0.01),
  'clarinet': Timbre(**_harmonics(11, 0.8, 2), attack=0.03),
  'violin': Timbre(**_harmonics(14, 1.0), attack=0.1, vibrato=0.008),
  'guitar': Timbre(**_harmonics(10, 1.2), attack=0.003, decay=0.35),
  'bell': Timbre(
    (1.0, 2.0, 2.4, 3.0, 4.5, 5.33), (1.0, 0.6, 0.5, 0.3, 0.3, 0.2), attack=0.002, decay=0.6
  ),
}

BEATS = ('drum', 'woodblock', 'shaker')


class Score(NamedTuple):
  """What is played.

  Attributes:
    kind: 'tone', 'chord', 'run' or 'rhythm'.
    instrument: one of `INSTRUMENTS`, or of `BEATS` for a rhythm.
    pitch: number of the note or the root in `PITCHES`; 0 for a rhythm.
    octave: one of `OCTAVES`.
    detail: quality of a chord, direction of a run, speed of a rhythm; '' for a tone.
    notes: of a run, beats of a rhythm; 1 otherwise.
  """

  kind: str
  instrument: str
  pitch: int
  octave: int
  detail: str
  notes: int

  @property
  def caption(self) -> str:
    """What is played, in words."""
    name, note = article(self.instrument), PITCHES[self.pitch]
    match self.kind:
      case 'tone':
        return f'{name} plays {note} in octave {self.octave}'
      case 'chord':
        return f'{name} plays a chord of {note} {self.detail}'
      case 'run':
        return f'{name} plays {NUMBERS[self.notes]} {self.detail} notes from {note}'
    return f'{name} plays {NUMBERS[self.notes]} {self.detail} beats'

  @property
  def keywords(self) -> list[str]:
    """The words that tell it from others."""
    words = [self.instrument, self.detail]
    words.append('' if self.kind == 'rhythm' else PITCHES[self.pitch])
    words.append(f'octave {self.octave}' if self.kind == 'tone' else '')
    words.append(NUMBERS[self.notes] if self.notes > 1 else '')
    return [word for word in words if word]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sounds(Maker[Score]):
  """Tones, chords, runs of notes and rhythms, one in four each, with captions.

  Attributes:
    rate: samples a second.
    seconds: length of every sound.
    made: how many sounds, and which are held out.
  """

  rate: int = 16_000
  seconds: float = 1.5
  made: Made = Made()

  def __post_init__(self):
    errors = wrong_sizes(self, ('rate',))
    if self.rate < 2000:
      errors.append(f'`rate` is {self.rate}; expected 2000 or more, or most notes cannot be heard')
    if not self.seconds >= 0.5:
      errors.append(f'`seconds` is {self.seconds}; expected 0.5 or more, room for six beats')
    if errors:
      raise ConfigError(errors)

  @property
  def samples(self) -> int:
    """N, samples of a sound."""
    return round(self.rate * self.seconds)

  @property
  def forms(self) -> dict[str, Form]:
    """Sounds [N] float32 from -1 to 1."""
    return {'sound': Form(shape=(self.samples,), dtype='float32')}

  def draw(self, rng: np.random.Generator) -> Score:
    """Draws what is played."""
    kind = pick(rng, ('tone', 'chord', 'run', 'rhythm'))
    if kind == 'rhythm':
      return Score(kind, pick(rng, BEATS), 0, 0, pick(rng, tuple(SPACING)), int(rng.integers(2, 7)))
    name, pitch = pick(rng, tuple(INSTRUMENTS)), int(rng.integers(len(PITCHES)))
    if kind == 'tone':
      return Score(kind, name, pitch, pick(rng, OCTAVES), '', 1)
    if kind == 'chord':
      return Score(kind, name, pitch, 4, pick(rng, tuple(QUALITIES)), 1)
    return Score(kind, name, pitch, 4, pick(rng, ('rising', 'falling')), int(rng.integers(3, 6)))

  def content(self, scene: Score) -> str:
    """The caption."""
    return scene.caption

  def parts(self, scene: Score) -> tuple[Part, ...]:
    """The sound, then its caption."""
    return Medium(modality='sound'), Learnt(text=scene.caption)

  def facts(self, scene: Score) -> dict:
    """The keywords of the caption."""
    return {'keywords': scene.keywords}

  def paint(self, scene: Score, rng: np.random.Generator, split: Split) -> list[np.ndarray]:
    """The sound [N] float32, from -1 to 1."""
    del split
    wave = np.zeros(self.samples, np.float32)
    lead = rng.uniform(0.0, 0.05) * self.seconds
    for start, pitch in notes(scene):
      at = round((lead + start * self.seconds) * self.rate)
      room = self.samples - at
      if scene.kind == 'rhythm':
        sound = beat(scene.instrument, room, self.rate, rng)
      else:
        length = room if scene.kind != 'run' else min(room, round(0.17 * self.samples))
        sound = tone(INSTRUMENTS[scene.instrument], hertz(pitch), length, self.rate, rng)
      wave[at : at + len(sound)] += sound
    wave *= rng.uniform(0.2, 0.9) / np.abs(wave).max()
    wave += 10 ** rng.uniform(-5, -2.5) * rng.standard_normal(self.samples, np.float32)
    return [np.clip(wave, -1, 1)]


def hertz(pitch: float) -> float:
  """Frequency of a pitch in semitones above the C of octave 0: the A of octave 4 has 440."""
  return 440.0 * 2 ** ((pitch - 57) / 12)


def notes(score: Score) -> list[tuple[float, int]]:
  """When each note begins, in lengths of the whole sound, and its pitch in semitones above C0."""
  root = 12 * score.octave + score.pitch
  match score.kind:
    case 'tone':
      return [(0.0, root)]
    case 'chord':
      return [(0.0, root + step) for step in QUALITIES[score.detail]]
    case 'run':
      sign = 1 if score.detail == 'rising' else -1
      steps = (0, 2, 4, 5, 7) if sign > 0 else (0, -1, -3, -5, -7)
      return [(0.18 * i, root + step) for i, step in enumerate(steps[: score.notes])]
  return [(SPACING[score.detail] * i, 0) for i in range(score.notes)]


def tone(
  timbre: Timbre, frequency: float, length: int, rate: int, rng: np.random.Generator
) -> np.ndarray:
  """A note [length] of a timbre, as loud as it comes.

  Partials above half the sampling rate are left out: they would come back as wrong pitches.

  Args:
    timbre: of the instrument.
    frequency: of the pitch, in hertz; up to five cents are lost or gained.
    length: samples.
    rate: samples a second.
    rng: of phases and pitch.
  """
  time = np.arange(length, dtype=np.float32) / np.float32(rate)
  frequency *= 2 ** (rng.uniform(-5, 5) / 1200)
  swing = 2 * np.pi * 5.5
  # The integral of a pitch that swings; float32 would lose the phase of long sounds.
  turns = frequency * np.arange(length) / rate
  if timbre.vibrato:
    turns -= frequency * timbre.vibrato / swing * np.cos(swing * time + rng.uniform(0, 2 * np.pi))
  wave = np.zeros(length, np.float32)
  for ratio, level in zip(timbre.ratios, timbre.levels):
    if ratio * frequency * (1 + timbre.vibrato) >= 0.5 * rate:
      continue
    angle = (2 * np.pi * ((ratio * turns + rng.random()) % 1.0)).astype(np.float32)
    partial = np.float32(level) * np.sin(angle)
    if timbre.decay:
      # High partials of what is struck or plucked fade sooner.
      partial *= np.exp(time * np.float32(-(ratio**0.5) / timbre.decay))
    wave += partial
  # A ramp at the end as well, or the cut would click.
  ramp = min(length, round(0.02 * rate))
  wave[length - ramp :] *= np.linspace(1, 0, ramp, dtype=np.float32)
  return wave * np.minimum(1, time / timbre.attack)


def beat(name: str, length: int, rate: int, rng: np.random.Generator) -> np.ndarray:
  """One beat [at most `length`] of a drum, a woodblock or a shaker."""
  time = np.arange(min(length, round(0.25 * rate))) / rate
  noise = rng.standard_normal(len(time))
  match name:
    case 'drum':
      sweep = 2 * np.pi * (70 * time + 60 * 0.03 * (1 - np.exp(-time / 0.03)))
      return np.sin(sweep) * np.exp(-time / 0.06) + 0.1 * noise * np.exp(-time / 0.005)
    case 'woodblock':
      ring = np.sin(2 * np.pi * 900 * time) + 0.5 * np.sin(
        2 * np.pi * min(1480, 0.45 * rate) * time
      )
      return ring * np.exp(-time / 0.015)
    case 'shaker':
      # The difference of neighbours takes the low part of the noise away.
      return np.diff(noise, prepend=0.0) * np.exp(-time / 0.02)
  raise ValueError(f'name: found {name!r}, expected one of {", ".join(BEATS)}')
