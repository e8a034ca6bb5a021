"""Sounds are what their captions say, found out from the samples alone."""

import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.media.made import Made
from deepseek_jax.data.media.sound import (
  BEATS,
  INSTRUMENTS,
  PITCHES,
  Score,
  Sounds,
  hertz,
  notes,
  tone,
)

SOURCE = Sounds(rate=16_000, made=Made(train=200, heldout=2))


def strength(wave: np.ndarray, frequency: float, rate: int) -> float:
  """How much of a frequency is in a sound, six cents around it."""
  time = np.arange(len(wave)) / rate
  near = frequency * 2 ** (np.linspace(-6, 6, 9) / 1200)
  return float(
    np.abs(np.exp(-2j * np.pi * near[:, None] * time) @ (wave * np.hanning(len(wave)))).max()
  )


def played(score: Score, rate: int = 16_000) -> np.ndarray:
  """The sound of a score."""
  source = Sounds(rate=rate)
  return source.paint(score, np.random.default_rng(3), 'train')[0]


@pytest.mark.parametrize('instrument', INSTRUMENTS)
def test_the_pitch_is_that_of_the_caption(instrument):
  """The named note is stronger than its neighbours a semitone away, at any rate."""
  for rate in (8000, 22_050):
    for pitch in (0, 9):
      wave = played(Score('tone', instrument, pitch, 4, '', 1), rate)
      levels = [strength(wave, hertz(48 + pitch + k), rate) for k in (-1, 0, 1)]
      assert levels[1] > 4 * max(levels[0], levels[2])
  assert hertz(57) == 440.0
  assert PITCHES[9] == 'A'


def test_chords_have_their_notes():
  wave = played(Score('chord', 'organ', 2, 4, 'minor', 1))
  levels = [strength(wave, hertz(50 + k), 16_000) for k in range(8)]
  assert sorted(np.argsort(levels)[-3:].tolist()) == [0, 3, 7]


@pytest.mark.parametrize('name', BEATS)
def test_beats_can_be_counted(name):
  """Onsets of the loudness: as many as the caption says, and as far apart."""
  for detail, count in (('slow', 3), ('fast', 6)):
    wave = played(Score('rhythm', name, 0, 0, detail, count))
    loud = np.abs(wave[: len(wave) // 160 * 160]).reshape(-1, 160).max(axis=1)
    on = np.concatenate([[False], loud > 0.3 * loud.max()])
    onsets = np.flatnonzero(on[1:] & ~on[:-1])
    assert len(onsets) == count
    gap = {'slow': 22.5, 'fast': 11.25}[detail]
    np.testing.assert_allclose(np.diff(onsets), gap, atol=1.5)


def test_runs_rise_and_fall():
  rising = notes(Score('run', 'flute', 0, 4, 'rising', 5))
  falling = notes(Score('run', 'flute', 0, 4, 'falling', 3))
  assert [pitch for _, pitch in rising] == [48, 50, 52, 53, 55]
  assert [pitch for _, pitch in falling] == [48, 47, 45]
  assert [start for start, _ in falling] == [0.0, 0.18, 0.36]
  wave = played(Score('run', 'flute', 0, 4, 'rising', 3))
  first, last = wave[:5000], wave[9500:13_000]
  assert strength(first, hertz(48), 16_000) > 3 * strength(first, hertz(52), 16_000)
  assert strength(last, hertz(52), 16_000) > 3 * strength(last, hertz(48), 16_000)


def test_nothing_above_half_the_rate():
  """Partials that do not fit are left out, instead of coming back as wrong pitches."""
  wave = tone(INSTRUMENTS['violin'], 1500.0, 8000, 8000, np.random.default_rng(0))
  spectrum = np.abs(np.fft.rfft(wave * np.hanning(8000)))
  # Partials are at 1500 and 3000; the third would come back at 3500.
  assert spectrum[3450:3550].max() < 0.01 * spectrum.max()
  assert spectrum[2950:3050].max() > 0.2 * spectrum.max()


def test_captions():
  records = SOURCE.open()
  for index in range(200):
    record, (wave,) = records.record('train', index), records.render('train', index)
    assert all(word in record.learnt for word in record.facts['keywords'])
    assert 0.19 < np.abs(wave).max() <= 1
  kinds = [records.scene('train', i)[0].kind for i in range(200)]
  assert all(30 < kinds.count(kind) < 70 for kind in ('tone', 'chord', 'run', 'rhythm'))
  assert (
    Score('chord', 'organ', 1, 4, 'minor', 1).caption == 'an organ plays a chord of C sharp minor'
  )
  assert Score('rhythm', 'drum', 0, 0, 'fast', 4).caption == 'a drum plays four fast beats'


def test_wrong_fields():
  with pytest.raises(ConfigError, match='`rate` is 100'):
    Sounds(rate=100)
  with pytest.raises(ConfigError, match='`seconds` is'):
    Sounds(seconds=0.1)
