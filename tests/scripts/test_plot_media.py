"""The picture of media beside answers: what is drawn of each kind, and the whole from answers."""

import dataclasses
import json

import numpy as np
import pytest
from absl import flags
from PIL import Image

from configs import five_modalities
from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.media.cloud import Clouds
from deepseek_jax.data.media.made import Made
from deepseek_jax.data.media.mixture import Mixture, Share
from deepseek_jax.data.media.sound import Sounds
from deepseek_jax.train.workdir import Workdir
from scripts import plot_media


def test_views_of_a_cloud():
  """From the front, up is the third coordinate; from above, the second; the near hide others."""
  points = np.array([[0, -1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 0], [-1, 0, -1, 0, 0, 1]], np.float32)
  front = plot_media.view(points, up=2, side=44)
  np.testing.assert_array_equal(front[0, 20], [1, 0, 0])
  np.testing.assert_array_equal(front[40, 0], [0, 0, 1])
  above = plot_media.view(points, up=1, side=44)
  np.testing.assert_array_equal(above[0, 20], [0, 1, 0])
  np.testing.assert_array_equal(above[40, 20], [1, 0, 0])
  assert (front[20, 40] == 1).all()


def test_a_clip_is_a_strip():
  clip = np.random.default_rng(0).integers(0, 255, (3, 4, 5, 3), np.uint8)
  strip = plot_media.picture_of('video', clip, None)
  assert strip.shape == (4, 15, 3)
  np.testing.assert_array_equal(strip[:, 5:10], clip[1])


@pytest.fixture
def flagged():
  """Flags as on a command line, put back after."""
  before = {name: flags.FLAGS[name].value for name in ('workdir', 'each', 'output', 'cache_dir')}
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  yield flags.FLAGS
  for name, value in before.items():
    flags.FLAGS[name].value = value


def test_answers_are_drawn(tmp_path, cache_dir, flagged, capsys):
  """One panel an answer; without an evaluation it is said what to run."""
  experiment = five_modalities.get_config()
  shares = (
    Share(source=Sounds(rate=8000, seconds=1.6, made=Made(train=4, heldout=3))),
    Share(source=Clouds(points=256, made=Made(train=4, heldout=3))),
  )
  data = dataclasses.replace(experiment.data, source=Mixture(shares=shares))
  model = dataclasses.replace(experiment.model, image=None, video=None)
  run = tmp_path / 'run'
  Workdir(run).write(dataclasses.replace(experiment, data=data, model=model))
  flagged.workdir, flagged.cache_dir, flagged.each = str(run), str(cache_dir), 2
  with pytest.raises(ConfigError, match=r'first run scripts/evaluate.py --workdir='):
    plot_media.main()
  answers = [
    {'source': source, 'document': i, 'given': '', 'text': 'a', 'reference': 'b'}
    for source in ('Sounds', 'Clouds')
    for i in range(3)
  ]
  text = json.dumps({'step': 1, 'answers': answers})
  (run / 'answers.json').write_text(text, encoding='utf-8')
  plot_media.main()
  assert capsys.readouterr().out.strip().endswith('media.png')
  with Image.open(run / 'media.png') as image:
    width, height = image.size
    colours = len(image.convert('RGB').getcolors(2**24) or [])
  assert width > 3 * height
  assert colours > 100
