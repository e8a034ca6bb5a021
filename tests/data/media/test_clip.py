"""Clips show what their captions say, as a program that only looks at them finds out."""

import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.media.clip import (
  Clips,
  FontDigits,
  HandwrittenDigits,
  Mover,
  handwritten,
  path,
)
from deepseek_jax.data.media.figure import COLOURS
from deepseek_jax.data.media.made import Made


def seen_path(clip: np.ndarray, colour: str) -> np.ndarray:
  """Middle of all that has a colour in each frame, [F, 2], in sides of the picture."""
  distance = np.abs(clip.astype(int) - COLOURS[colour]).sum(axis=-1)
  places = [np.argwhere(frame < 60) for frame in distance]
  return np.array([p.mean(axis=0)[::-1] / len(clip[0]) for p in places])


def test_things_move_as_they_are_said_to():
  """Direction, speed and colour, from the pixels alone."""
  source = Clips(movers=1, side=32, made=Made(train=80, heldout=2))
  records = source.open()
  for index in range(80):
    scene, _ = records.scene('train', index)
    (mover,) = scene
    (clip,) = records.render('train', index)
    track = seen_path(clip, mover.thing.split()[1])
    shift = track[-1] - track[0]
    if mover.motion in ('left', 'right', 'up', 'down'):
      axis, sign = {'left': (0, -1), 'right': (0, 1), 'up': (1, -1), 'down': (1, 1)}[mover.motion]
      far = {'slowly': 0.22, 'quickly': 0.55}[mover.speed]
      assert sign * shift[axis] == pytest.approx(far, abs=0.05), records.record('train', index)
      assert abs(shift[1 - axis]) < 0.05
    elif not mover.motion:
      assert np.abs(track - track[0]).max() < 0.05
    elif mover.motion == 'back and forth':
      assert np.abs(shift).max() < 0.06
      assert np.ptp(track, axis=0).max() > 0.2
    else:
      radius = np.linalg.norm(np.diff(track, axis=0), axis=1)
      assert radius.std() < 0.2 * radius.mean()


def test_paths_stay_inside():
  """Whatever moves wherever: its middle keeps a margin."""
  rng = np.random.default_rng(0)
  for motion in ('left', 'down', 'in a circle', 'back and forth', ''):
    for speed in ('slowly', 'quickly') if motion else ('',):
      places = np.concatenate([path(Mover('x', motion, speed), rng, 8) for _ in range(50)])
      assert 0.159 < places.min() < places.max() < 0.841


def test_captions():
  """In one order, and with the words that tell clips apart."""
  records = Clips(made=Made(train=300, heldout=2)).open()
  found = [records.record('train', i) for i in range(300)]
  two = [record for record in found if ' and a' in record.learnt.replace('back and', '')]
  assert 100 < len(two) < 200
  for record in found:
    assert all(word in record.learnt for word in record.facts['keywords'] if word != 'still')


def test_digits():
  """Digits are told by their shape; brighter than the paper."""
  records = Clips(looks=FontDigits(), movers=1, made=Made(train=40, heldout=2)).open()
  for index in range(40):
    (clip,) = records.render('train', index)
    assert clip.max() > 150 > 60 > np.median(clip)
  assert Clips(looks=FontDigits()).looks.things[7] == 'the digit 7'


def test_handwriting():
  """Writers of held-out digits are not seen in training."""
  pytest.importorskip('sklearn')
  images, labels = handwritten()
  assert images.max() == 1
  looks, rng = HandwrittenDigits(), np.random.default_rng(0)
  drawn = {
    split: {looks.bitmap(3, rng, split).tobytes() for _ in range(400)}
    for split in ('train', 'heldout')
  }
  assert not drawn['train'] & drawn['heldout']
  assert len(drawn['train']) > 100 > len(drawn['heldout']) > 10
  assert len(labels) == 1797


def test_a_missing_library(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  handwritten.cache_clear()
  with pytest.raises(
    ConfigError, match=r"needs .* scikit-learn: pip install 'deepseek_jax\[media\]'"
  ):
    handwritten()


def test_wrong_fields():
  for fields, message in [
    ({'movers': 5}, '`movers` is 5'),
    ({'frames': 1}, '`frames` is 1'),
    ({'side': 8}, '`side` is 8'),
  ]:
    with pytest.raises(ConfigError, match=message):
      Clips(**fields)
