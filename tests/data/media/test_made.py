"""Made documents: the same from the same number, and no description in both splits."""

import dataclasses

import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.media.clip import Clips, FontDigits
from deepseek_jax.data.media.cloud import Clouds
from deepseek_jax.data.media.made import Made, article
from deepseek_jax.data.media.question import Questions
from deepseek_jax.data.media.scene import Scenes
from deepseek_jax.data.media.sound import Sounds

MADE = Made(train=400, heldout=60)
SOURCES = [
  Clips(made=MADE, side=16, frames=3),
  Clips(looks=FontDigits(), made=MADE, side=16, frames=3),
  Sounds(made=MADE, rate=2000, seconds=0.5),
  Clouds(made=MADE, points=32),
  Scenes(made=MADE, side=30),
  Questions(made=MADE, side=30),
]


@pytest.mark.parametrize('source', SOURCES)
def test_splits_share_no_description(source):
  """However the two are said: contents of one split never come in the other."""
  records = source.open()
  found = {
    split: {source.content(records.scene(split, i)[0]) for i in range(records.count(split))}
    for split in ('train', 'heldout')
  }
  assert len(found['heldout']) > 5
  assert not found['train'] & found['heldout']
  # Everything that held-out captions are made of is seen in training, in other combinations.
  words = {split: {w for text in texts for w in text.split()} for split, texts in found.items()}
  assert words['heldout'] <= words['train']


@pytest.mark.parametrize('source', SOURCES)
def test_a_number_says_all(source):
  """Texts and arrays depend on the number, and on the seed in training only."""
  first, again = source.open(), dataclasses.replace(source).open()
  other = dataclasses.replace(source, made=dataclasses.replace(source.made, seed=1)).open()
  for split in ('train', 'heldout'):
    same = []
    for index in (0, 7, 31):
      record, arrays = first.record(split, index), first.render(split, index)
      assert again.record(split, index) == record
      assert list(record.media) == list(source.forms)
      for values, twin, form in zip(
        arrays, again.render(split, index), source.forms.values(), strict=True
      ):
        np.testing.assert_array_equal(values, twin)
        assert values.dtype == form.dtype
        assert values.shape == form.shape
        assert np.isfinite(values).all()
      twins = other.render(split, index)
      same += [np.array_equal(a, b) for a, b in zip(arrays, twins)]
    assert all(same) if split == 'heldout' else not any(same)
  assert source.fingerprint() == again.source.fingerprint() != other.source.fingerprint()
  assert [r.name for r in first.walk('heldout')] == [
    first.record('heldout', i).name for i in range(60)
  ]
  with pytest.raises(IndexError, match='document 60 is outside the 60 of heldout'):
    first.record('heldout', 60)


def test_wrong_fields():
  for fields, message in [
    ({'train': 0}, '`train` is 0'),
    ({'heldout_fraction': 1.0}, '`heldout_fraction` is 1.0'),
    ({'seed': -1}, '`seed` is -1'),
  ]:
    with pytest.raises(ConfigError, match=message):
      Made(**fields)


def test_articles():
  assert [article(noun) for noun in ('organ', 'cone')] == ['an organ', 'a cone']
