"""Speech: the same from the same number, as long as its sentence; a clear error without it."""

import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.media.made import Made
from deepseek_jax.data.media.speech import Speech, sentences

SOURCE = Speech(made=Made(train=12, heldout=6), rate=8000, seconds=3.0, words=6)


def test_a_missing_library(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(ConfigError, match=r"espeakng-loader: pip install 'deepseek_jax\[speech\]'"):
    SOURCE.open()


def test_speech():
  """Longer sentences take longer; nothing is cut or silent."""
  pytest.importorskip('espeakng_loader')
  records = SOURCE.open()
  lengths, letters = [], []
  for index in range(12):
    record, (wave,) = records.record('train', index), records.render('train', index)
    np.testing.assert_array_equal(records.render('train', index)[0], wave)
    assert 0.29 < np.abs(wave).max() < 0.91
    assert 4000 < len(wave) <= 24_000
    lengths.append(len(wave))
    letters.append(len(record.learnt))
  assert np.corrcoef(lengths, letters)[0, 1] > 0.5
  texts = {
    s: {SOURCE.content(records.scene(s, i)[0]) for i in range(6)} for s in ('train', 'heldout')
  }
  assert not texts['train'] & texts['heldout']
  voices = {records.record('train', i).facts['voice'] for i in range(12)}
  assert len(voices) > 4


def test_sentences():
  found = sentences(6)
  assert len(found) > 1000
  assert all(3 <= len(text.split()) <= 6 for text in found)


def test_wrong_fields():
  with pytest.raises(ConfigError, match='`words` is 20'):
    Speech(words=20)
