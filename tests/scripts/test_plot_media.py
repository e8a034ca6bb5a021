"""The picture of media beside answers: what is drawn of each kind, and the whole from answers."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image

from configs import five_modalities
from deepseek_jax.data.media.cloud import Clouds
from deepseek_jax.data.media.made import Made
from deepseek_jax.data.media.mixture import Mixture, Share
from deepseek_jax.data.media.sound import Sounds
from deepseek_jax.train.workdir import Workdir
from scripts import media_panels

ROOT = pathlib.Path(__file__).parents[2]


def test_views_of_a_cloud():
  """From the front, up is the third coordinate; from above, the second; the near hide others."""
  points = np.array([[0, -1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 0], [-1, 0, -1, 0, 0, 1]], np.float32)
  front = media_panels.view(points, up=2, side=44)
  np.testing.assert_array_equal(front[0, 20], [1, 0, 0])
  np.testing.assert_array_equal(front[40, 0], [0, 0, 1])
  above = media_panels.view(points, up=1, side=44)
  np.testing.assert_array_equal(above[0, 20], [0, 1, 0])
  np.testing.assert_array_equal(above[40, 20], [1, 0, 0])
  assert (front[20, 40] == 1).all()


def test_a_clip_is_a_strip():
  clip = np.random.default_rng(0).integers(0, 255, (3, 4, 5, 3), np.uint8)
  strip = media_panels.picture_of('video', clip, None)
  assert strip.shape == (4, 15, 3)
  np.testing.assert_array_equal(strip[:, 5:10], clip[1])


def plot(run, cache_dir):
  """Runs the script on a run's folder."""
  command = [
    sys.executable,
    'scripts/plot_media.py',
    f'--workdir={run}',
    f'--cache_dir={cache_dir}',
  ]
  return subprocess.run([*command, '--each=2'], cwd=ROOT, capture_output=True, text=True)


def test_answers_are_drawn(tmp_path, cache_dir):
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
  early = plot(run, cache_dir)
  assert early.returncode != 0
  assert f'first run scripts/evaluate.py --workdir={run}' in early.stderr
  answers = [
    {'source': source, 'document': i, 'given': '', 'text': 'a', 'reference': 'b'}
    for source in ('Sounds', 'Clouds')
    for i in range(3)
  ]
  text = json.dumps({'step': 1, 'answers': answers})
  (run / 'answers.json').write_text(text, encoding='utf-8')
  done = plot(run, cache_dir)
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip().endswith('media.png')
  with Image.open(run / 'media.png') as image:
    width, height = image.size
    colours = len(image.convert('RGB').getcolors(2**24) or [])
  assert width > 3 * height
  assert colours > 100
