"""The drawings in the package: whole, split by drawing, and damage is named."""

import collections
import shutil

import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data import captions, drawing
from deepseek_jax.data.captions import ImageCaptions
from deepseek_jax.data.drawing import CONTAINER, FOLDERS, IMAGES_FOLDER, INDEX, OpenClipart


@pytest.fixture(scope='module')
def records():
  """All records."""
  return drawing.read_records(IMAGES_FOLDER)


def test_index_and_container_agree(records):
  assert records[0]['start'] == 0
  assert records[-1]['start'] + records[-1]['bytes'] == (IMAGES_FOLDER / CONTAINER).stat().st_size
  names = [record['name'] for record in records]
  assert len(set(names)) == len(names)
  assert {name.split('/')[0] for name in names} <= set(FOLDERS)


def test_split_is_by_drawing(records):
  """No variant of a held-out drawing is trained on, and no file is twice."""
  sides = collections.defaultdict(set)
  for record in records:
    sides[record['drawing']].add(record['split'])
  assert max(map(len, sides.values())) == 1
  heldout = sum(record['split'] == 'heldout' for record in records)
  assert 0.05 < heldout / len(records) < 0.12
  by_file = collections.defaultdict(set)
  for record in records:
    by_file[record['svg']].add(record['split'])
  assert max(map(len, by_file.values())) == 1


def test_no_heldout_picture_looks_like_a_trained_one():
  """Measured on the packed pictures themselves; the limit leaves room for what packing loses."""
  source = OpenClipart()
  cells = {}
  for split in ('train', 'heldout'):
    pictures = source.pictures(source.records(split)).astype(np.float32)
    grey = pictures @ np.array([0.299, 0.587, 0.114], np.float32)
    x = grey.reshape(-1, 16, 4, 16, 4).mean(axis=(2, 4)).reshape(len(grey), -1)
    x -= x.mean(axis=1, keepdims=True)
    cells[split] = x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-6)
  likeness = cells['heldout'] @ cells['train'].T
  assert likeness.max() < 0.96
  assert likeness.max() > 0.8


def test_captions_begin_with_their_keywords(records):
  for record in records:
    assert record['keywords']
    assert record['caption'].split(':')[0] == ', '.join(record['keywords'])
    assert record['caption'].isascii()


def test_pictures(records):
  pictures = drawing.read_pictures(IMAGES_FOLDER, records[:20])
  assert pictures.shape == (20, 64, 64, 3)
  assert pictures.dtype == np.uint8
  assert (pictures.reshape(20, -1).std(axis=1) > 2).all()
  blob = OpenClipart().packed(records[7])
  assert blob[:4] == b'RIFF'
  assert blob[8:12] == b'WEBP'


@pytest.fixture
def copy(tmp_path, monkeypatch):
  """A copy of the package's folder, read instead of it."""
  for name in (CONTAINER, INDEX):
    shutil.copy(IMAGES_FOLDER / name, tmp_path / name)
  monkeypatch.setattr(drawing, 'IMAGES_FOLDER', tmp_path)
  return tmp_path


def damage(folder, record, change):
  """Rewrites the bytes of one picture."""
  path = folder / CONTAINER
  content = bytearray(path.read_bytes())
  span = slice(record['start'], record['start'] + record['bytes'])
  content[span] = change(bytes(content[span]))
  path.write_bytes(content)


@pytest.mark.parametrize(
  'change',
  [
    lambda blob: bytes(len(blob)),
    lambda blob: blob[:50] + bytes([blob[50] ^ 1]) + blob[51:],
    lambda blob: b'GIF8' + blob[4:],
  ],
)
def test_a_damaged_picture_is_named(copy, tmp_path, change):
  source = OpenClipart(folders=('food',))
  victim = source.records('train')[3]
  damage(copy, victim, change)
  with pytest.raises(ConfigError, match=victim['name']) as caught:
    ImageCaptions(source=source, length=64).prepare(tmp_path / 'cache')
  assert len(caught.value.messages) == 1
  # What is not damaged can be read.
  assert len(OpenClipart(folders=('tools',)).pictures(source.records('heldout')))


def test_a_cut_container_names_some_of_what_is_lost(copy, tmp_path):
  path = copy / CONTAINER
  path.write_bytes(path.read_bytes()[:10_000])
  with pytest.raises(ConfigError, match='is damaged') as caught:
    ImageCaptions(length=64).prepare(tmp_path / 'cache')
  assert len(caught.value.messages) == 9
  assert 'more' in caught.value.messages[-1]


def test_a_picture_that_decodes_to_something_else(copy, records, monkeypatch):
  """A whole file of another kind or size, whose checksum is right."""
  monkeypatch.setattr(drawing.zlib, 'crc32', lambda blob: records[0]['crc32'])
  damage(copy, records[0], lambda blob: b'x' * len(blob))
  with pytest.raises(ConfigError, match='cannot be decoded'):
    drawing.read_pictures(copy, records[:1])


def test_a_damaged_index(copy):
  (copy / INDEX).write_bytes((IMAGES_FOLDER / INDEX).read_bytes()[:1000])
  with pytest.raises(ConfigError, match='index of the drawings is damaged'):
    OpenClipart().records('train')


def test_folders():
  food = OpenClipart(folders=('food',))
  names = [record['name'] for record in food.records('train')]
  assert names
  assert all(name.startswith('food/') for name in names)
  assert food.fingerprint() != OpenClipart().fingerprint()
  with pytest.raises(ConfigError, match='fud'):
    OpenClipart(folders=('fud',))


def test_decoded_pictures_are_kept(tmp_path):
  source = OpenClipart(folders=('tools',))
  first = captions.decoded(source, 'heldout', tmp_path)
  again = captions.decoded(source, 'heldout', tmp_path)
  assert len(list(tmp_path.iterdir())) == 1
  np.testing.assert_array_equal(first, again)
  np.testing.assert_array_equal(first, source.pictures(source.records('heldout')))
