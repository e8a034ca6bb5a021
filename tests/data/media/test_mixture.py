"""Sources together: shares, documents of several media, and what does not go together."""

import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.media.clip import Clips
from deepseek_jax.data.media.made import Made
from deepseek_jax.data.media.mixture import Joined, Mixture, Share
from deepseek_jax.data.media.plan import best_fit_media, mix
from deepseek_jax.data.media.scene import Scenes
from deepseek_jax.data.media.sound import Sounds

MADE = Made(train=5, heldout=3)
SCENES, SOUNDS = Scenes(made=MADE, side=30), Sounds(made=Made(train=9, heldout=2), rate=2000)


def test_joined_documents():
  """One after the other, media and texts in order; what is held out stays so."""
  source = Joined(sources=(SCENES, SOUNDS, SCENES))
  records, alone = source.open(None), [SCENES.open(), SOUNDS.open()]
  assert (records.count('train'), records.count('heldout')) == (5, 2)
  record = records.record('heldout', 1)
  assert record.media == ('image', 'sound', 'image')
  parts = [r.record('heldout', 1) for r in alone]
  assert record.learnt == parts[0].learnt + parts[1].learnt + parts[0].learnt
  assert record.facts['joined'][1] == parts[1].facts
  assert list(records.walk('heldout'))[1] == record
  arrays = records.render('heldout', 1)
  np.testing.assert_array_equal(arrays[1], alone[1].render('heldout', 1)[0])
  assert [source.holds(kind) for kind in ('image', 'sound', 'video')] == [2, 1, 0]
  with pytest.raises(IndexError):
    records.record('heldout', 2)


def test_what_does_not_go_together():
  with pytest.raises(ConfigError, match='two or more, found 1'):
    Joined(sources=(SCENES,))
  with pytest.raises(ConfigError, match=r'image is uint8 \[30, 30, 3\] .* \[64, 64, 3\] in Scenes'):
    Mixture(shares=(Share(source=SCENES), Share(source=Scenes())))
  with pytest.raises(ConfigError, match='at least one'):
    Mixture(shares=())
  for weight in (0.0, -1.0, float('nan'), float('inf')):
    with pytest.raises(ConfigError, match=r'Share\.weight'):
      Share(source=SCENES, weight=weight)
  assert Mixture(shares=(Share(source=SCENES), Share(source=Clips()))) is not None


def test_an_epoch_has_all_and_the_shares():
  """The shortest epoch in which every piece of every source comes."""
  counts, weights = [10, 100, 7], [1.0, 2.0, 1.0]
  order = mix(counts, weights, np.random.default_rng(0))
  assert len(order) == 200
  for k, (count, share) in enumerate(zip(counts, (0.25, 0.5, 0.25))):
    times = np.bincount(order[order[:, 0] == k, 1], minlength=count)
    assert times.sum() == 200 * share
    assert 1 <= times.min() <= times.max() <= times.min() + 1
  with pytest.raises(ConfigError, match='more than 20000000'):
    mix([10_000, 10], [1e-9, 1.0], np.random.default_rng(0))


def test_rows_hold_what_they_have_room_for():
  """No row is over-full in tokens or in media; without media it packs as tightly as best fit."""
  rng = np.random.default_rng(1)
  sizes, media = rng.integers(5, 60, 500), rng.integers(0, 3, (500, 2))
  most = np.array([3, 4])
  row_of = best_fit_media(sizes, media, 100, most)
  rows = row_of.max() + 1
  assert set(row_of) == set(range(rows))
  totals = np.zeros(rows)
  np.add.at(totals, row_of, sizes)
  held = np.zeros((rows, 2))
  np.add.at(held, row_of, media)
  assert totals.max() <= 100
  assert (held <= most).all()
  assert (held == most).any()
  free = best_fit_media(sizes, 0 * media, 100, most)
  assert free.max() + 1 <= 1.06 * sizes.sum() / 100
