"""Ready data: it fits in its rows, is written and read as text, and can be changed from outside."""

import dataclasses

import numpy as np
import pytest

from configs import tiny_caption
from deepseek_jax.core.override import override
from deepseek_jax.core.serialise import from_json, to_json
from deepseek_jax.data.media.drawings import Drawings
from deepseek_jax.data.media.mixture import Mixture, Share
from deepseek_jax.data.media.presets import FIVE_MODALITIES, IMAGE_TEXT, VISUAL_QUESTIONS
from deepseek_jax.data.media.question import Questions

PRESETS = {'questions': VISUAL_QUESTIONS, 'image_text': IMAGE_TEXT, 'five': FIVE_MODALITIES}


def small(config):
  """The same data with few documents."""
  shares = []
  for share in config.shares:
    source = share.source
    if not isinstance(source, Drawings):
      source = dataclasses.replace(
        source, made=dataclasses.replace(source.made, train=60, heldout=20)
      )
    shares.append(Share(source=source, weight=share.weight))
  return dataclasses.replace(config, source=Mixture(shares=tuple(shares)), batch_size=4)


@pytest.mark.parametrize('name', PRESETS)
def test_rows(name, cache_dir):
  """Everything fits; every kind of media comes."""
  data = small(PRESETS[name]).prepare(cache_dir)
  assert data.train.occupancy > 0.4
  # Drawings are many: of few made documents not every batch has one.
  seen = dict.fromkeys(data.config.media, 0)
  for split in data.by_source:
    batch = split.batch(range(min(4, split.rows)))
    for kind, media in batch.media.items():
      seen[kind] += int((np.asarray(media.counts) > 0).sum())
  assert min(seen.values()) > 0


@pytest.mark.parametrize('name', PRESETS)
def test_text_and_back(name):
  experiment = dataclasses.replace(tiny_caption.get_config(), data=PRESETS[name])
  assert from_json(to_json(experiment)) == experiment


def test_overrides():
  data = dataclasses.replace(VISUAL_QUESTIONS, source=Questions())
  experiment = dataclasses.replace(tiny_caption.get_config(), data=data)
  changed, _ = override(
    experiment,
    {
      'data.source.about': ('count', 'size'),
      'data.source.layout': 'QuestionFirst()',
      'data.layout': 'Marked(image=2)',
      'data.workers': 2,
      'data.source.made.train': 10,
    },
  )
  assert changed.data.source.about == ('count', 'size')
  assert changed.data.source.made.train == 10
  assert changed.data.layout.places(16) == 1
  folder, _ = override(experiment, {'data.source': "MediaFolder('pictures', longest=99)"})
  assert folder.data.source.path == 'pictures'
  assert folder.data.source.longest == 99
