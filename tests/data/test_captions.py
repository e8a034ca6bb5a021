"""Rows of pictures and captions: what is learned, and any batch from its number alone."""

import dataclasses

import jax
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.captions import ImageCaptions
from deepseek_jax.data.drawing import OpenClipart
from deepseek_jax.data.packed_split import heldout_batches
from deepseek_jax.data.tokenizer import Bytes

CONFIG = ImageCaptions(
  source=OpenClipart(folders=('tools',)),
  tokenizer=Bytes(),
  slots=4,
  length=100,
  batch_size=7,
  shuffle_seed=3,
)


@pytest.fixture(scope='module')
def data(cache_dir):
  """The tools."""
  return CONFIG.prepare(cache_dir)


def take(batches, count):
  """The next few batches."""
  return [next(batches) for _ in range(count)]


def assert_equal(batches, expected):
  """Every field of every batch."""
  assert len(batches) == len(expected) > 0
  for found, wanted in zip(batches, expected):
    assert all(value is not None for value in vars(wanted).values())
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_row(data):
  """Bos, the picture's places, the caption; only the caption and its end are learned."""
  split = data.train
  batch = split.batch([5, -1])
  caption = split.records[5]['caption']
  ids = data.tokenizer.encode(caption).tolist()
  count = 1 + 4 + len(ids)
  assert batch.tokens[0].tolist() == [0, 2, 2, 2, 2, *ids] + [0] * (100 - count)
  assert batch.placeholders[0].tolist() == [-1, 0, 1, 2, 3] + [-1] * 95
  learned = batch.weights[0] > 0
  assert learned.sum() == len(ids) + 1
  assert batch.targets[0][learned].tolist() == [*ids, data.tokenizer.eos]
  assert not learned[:4].any()
  assert batch.segments[0].tolist() == [1] * count + [0] * (100 - count)
  assert batch.positions[0][:count].tolist() == list(range(count))
  np.testing.assert_array_equal(batch.media['image'].values[0, 0], split.pictures[5])
  assert batch.documents[0][0] == 5
  # The second row is padding.
  assert not batch.weights[1].any()
  assert not batch.segments[1].any()
  assert (batch.placeholders[1] == -1).all()
  assert not batch.media['image'].values[1].any()
  assert batch.media['image'].counts.tolist() == [[64], [0]]


@pytest.mark.parametrize('step', [1, 6, 11, 13, 40])
def test_starting_at_a_step_is_skipping_to_it(data, step):
  """Also beyond the end of an epoch."""
  assert data.train.rows < 7 * 40
  whole = take(data.train_batches(0), step + 3)
  assert_equal(take(data.train_batches(step), 3), whole[step:])


def test_hosts_read_their_rows(data):
  """Put together they are the batch."""
  expected = take(data.train_batches(2), 3)
  parts = [take(data.train_batches(2, rows=rows), 3) for rows in (slice(0, 3), slice(3, 7))]
  for number, batch in enumerate(expected):
    joined = jax.tree.map(lambda *pieces: np.concatenate(pieces), *(p[number] for p in parts))
    jax.tree.map(np.testing.assert_array_equal, joined, batch)


def test_every_epoch_has_every_picture_once(data):
  rows = data.train.rows
  batches = take(data.train_batches(0), -(-2 * rows // 7))
  seen = np.concatenate([batch.documents[:, 0] for batch in batches])[: 2 * rows]
  assert sorted(seen[:rows]) == sorted(seen[rows:]) == list(range(rows))
  assert seen[:rows].tolist() != seen[rows:].tolist()


def test_heldout_rows(data):
  """All once, in order; the count of targets is that of the weights."""
  batches = list(heldout_batches(data.heldout, 7))
  documents = np.concatenate([batch.documents[:, 0] for batch in batches])
  assert documents[documents >= 0].tolist() == list(range(data.heldout.rows))
  assert sum(batch.weights.sum() for batch in batches) == data.heldout.targets
  used = sum((batch.segments > 0).sum() for batch in batches)
  # A row's last target has no place of its own, its bos has one.
  assert used / (data.heldout.rows * 100) == pytest.approx(data.heldout.occupancy)
  text = data.heldout_text()
  assert text.count(b'\n') == data.heldout.rows
  assert data.heldout.text_bytes == len(text) - data.heldout.rows
  nats = 3.0 * data.heldout.text_bytes * np.log(2)
  assert data.heldout.bits_per_byte(nats) == pytest.approx(3.0)


def test_the_two_splits_have_no_picture_in_common(data):
  trained = {record['drawing'] for record in data.train.records}
  assert not trained & {record['drawing'] for record in data.heldout.records}


def test_wrong_sizes(cache_dir):
  with pytest.raises(ConfigError) as caught:
    ImageCaptions(slots=0, batch_size=0, shuffle_seed=-1, length=0)
  assert len(caught.value.messages) == 4
  short = dataclasses.replace(CONFIG, length=10)
  with pytest.raises(ConfigError, match=r'length is 10, room for captions of 5 tokens; .*tools/'):
    short.prepare(cache_dir)


def test_rows_outside_the_split(data):
  with pytest.raises(IndexError, match='outside'):
    data.train.batch([data.train.rows])
