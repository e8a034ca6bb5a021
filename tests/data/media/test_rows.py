"""Rows of several modalities: what stands where, and any batch from its number alone."""

import dataclasses
import pickle

import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.drawing import OpenClipart
from deepseek_jax.data.media.clip import Clips
from deepseek_jax.data.media.cloud import Clouds
from deepseek_jax.data.media.drawings import Drawings, Passages
from deepseek_jax.data.media.made import Made
from deepseek_jax.data.media.mixture import Joined, Mixture, Share
from deepseek_jax.data.media.plan import Alone, Marked, Packed
from deepseek_jax.data.media.question import Questions
from deepseek_jax.data.media.record import Learnt, Medium
from deepseek_jax.data.media.rows import MediaCorpus, Slots
from deepseek_jax.data.media.sound import Sounds
from deepseek_jax.data.packed_split import heldout_batches
from deepseek_jax.data.source import TextFiles
from deepseek_jax.data.tokenizer import Bytes

MADE = Made(train=23, heldout=7)
CLIPS = Clips(side=16, frames=2, made=MADE)
SOUNDS = Sounds(rate=2000, seconds=0.5, made=MADE)
CLOUDS = Clouds(points=16, made=MADE)
SLOTS = Slots(image=4, video=3, sound=2, points=5)
KINDS = ('image', 'video', 'sound', 'points')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """All modalities, text only, and documents of several media."""
  folder = tmp_path_factory.mktemp('text')
  for i in range(9):
    (folder / f'{i}.txt').write_text(f'{i} blind mice; ' * (5 + 3 * i), encoding='utf-8')
  text = Passages(source=TextFiles(str(folder / '*.txt'), heldout_fraction=0.3))
  return Mixture(
    shares=(
      Share(source=CLIPS),
      Share(source=SOUNDS, weight=2.0),
      Share(source=Joined(sources=(CLOUDS, CLIPS, CLOUDS))),
      Share(source=Drawings(source=OpenClipart(folders=('food',))), weight=10.0),
      Share(source=text, weight=0.5),
    )
  )


@pytest.fixture(scope='module')
def data(source, tmp_path_factory):
  """Packed rows of bytes."""
  config = MediaCorpus(
    source=source, tokenizer=Bytes(), slots=SLOTS, length=300, batch_size=3, shuffle_seed=4
  )
  return config.prepare(tmp_path_factory.mktemp('cache'))


def leaves(batch) -> dict:
  """Every array of a batch by name."""
  found = {name: field for name, field in vars(batch).items() if name != 'media'}
  for kind, media in (batch.media or {}).items():
    found[f'{kind} values'], found[f'{kind} counts'] = media.values, media.counts
  return found


def assert_equal(found, wanted) -> None:
  """Every array of two batches."""
  found, wanted = leaves(found), leaves(wanted)
  assert found.keys() == wanted.keys()
  for name, field in wanted.items():
    np.testing.assert_array_equal(found[name], field, err_msg=name)


def expected_pieces(split, batch, line):
  """The documents of a row as an oracle lays them out, from records and arrays alone."""
  most = {kind: split.config.media[kind].values[0] for kind in KINDS}
  first = dict(zip(KINDS, np.cumsum([0, *(most[k] * getattr(SLOTS, k) for k in KINDS)]).tolist()))
  used = dict.fromkeys(KINDS, 0)
  for number in range(1, batch.segments[line].max() + 1):
    here = np.flatnonzero(batch.segments[line] == number)
    document = int(batch.documents[line, here[0]])
    source, index = split.where(document)
    record, arrays = split.record(document), iter(source.records.render(split.name, index))
    ids, learnt, places = [0], [0], [-1]
    for part in record.parts:
      if isinstance(part, Medium):
        kind, values = part.modality, next(arrays)
        at, slots = used[kind], getattr(SLOTS, part.modality)
        used[kind] += 1
        media = batch.media[kind]
        assert media.counts[line, at] == len(values)
        np.testing.assert_array_equal(media.values[line, at][: len(values)], values)
        ids += [2] * slots
        learnt += [0] * slots
        places += [first[kind] + at * slots + k for k in range(slots)]
      else:
        text = [3 + b for b in part.text.encode()]
        ids += text
        learnt += [int(isinstance(part, Learnt))] * len(text)
        places += [-1] * len(text)
    yield here, document, [*ids, 1], [*learnt, learnt[-1]], [*places, -1]
  for kind in KINDS:
    assert (batch.media[kind].counts[line, used[kind] :] == 0).all()
    assert not batch.media[kind].values[line, used[kind] :].any()
    assert used[kind] <= most[kind]


@pytest.mark.parametrize('name', ['train', 'heldout'])
def test_rows_are_what_an_oracle_lays_out(data, name):
  """Tokens, targets, weights, positions, placeholders and media of every document."""
  split, targets, seen = getattr(data, name), 0, set()
  for index in range(split.rows):
    batch = split.batch([-1, index])
    assert not batch.segments[0].any()
    assert (batch.placeholders[0] == -1).all()
    for here, document, ids, learnt, places in expected_pieces(split, batch, 1):
      assert np.array_equal(here, np.arange(here[0], here[0] + len(here)))
      start = 0
      if len(ids) - 1 > 300:
        # Text is cut into pieces of whole rows; which one this is, the tokens say.
        found = batch.tokens[1, here].tolist()
        start = next(k for k in range(0, len(ids), 300) if ids[k : k + len(found)] == found)
      stop = start + len(here)
      assert stop == len(ids) - 1 or len(here) == 300
      assert batch.tokens[1, here].tolist() == ids[start:stop]
      assert batch.targets[1, here].tolist() == ids[start + 1 : stop + 1]
      assert batch.weights[1, here].tolist() == learnt[start + 1 : stop + 1]
      assert batch.placeholders[1, here].tolist() == places[start:stop]
      assert batch.positions[1, here].tolist() == list(range(len(here)))
      assert (batch.documents[1, here] == document).all()
      targets += sum(learnt[start + 1 : stop + 1])
      seen.add(document)
  assert targets == split.targets
  assert seen == set(range(split.documents))
  used = sum((split.batch([i]).segments > 0).sum() for i in range(split.rows))
  assert used / (split.rows * 300) == pytest.approx(split.occupancy)


def test_shares(data):
  """Training documents come as the weights say; those of a small source come again."""
  pieces = data.train.plan.pieces
  shares = np.bincount(pieces[:, 0], minlength=5) / len(pieces)
  np.testing.assert_allclose(shares, np.array([1, 2, 1, 10, 0.5]) / 14.5, atol=0.01)
  for k in range(5):
    count = len(data.train.sources[k].documents.offsets) - 1
    times = np.bincount(pieces[pieces[:, 0] == k, 3], minlength=count)
    # A long text is several pieces.
    assert times.min() >= 1
    assert k == 4 or times.max() - times.min() <= 1


def test_missing_modalities_are_fine(data):
  """Some rows have no picture, or no media at all; the arrays are there and empty."""
  counts = {k: [] for k in KINDS}
  for index in range(data.train.rows):
    batch = data.train.batch([index])
    for kind in KINDS:
      counts[kind].append((batch.media[kind].counts > 0).sum())
  assert all(min(c) == 0 < max(c) for c in counts.values())
  shapes = data.config.media
  assert {k: s.values for k, s in shapes.items()} == {
    'image': (4, 64, 64, 3),
    'video': (2, 2, 16, 16, 3),
    'sound': (2, 1000),
    'points': (2, 16, 6),
  }
  batch = data.train.batch([0, 1])
  for kind, shape in shapes.items():
    assert batch.media[kind].values.shape == (2, *shape.values)
    assert batch.media[kind].values.dtype == shape.dtype


def test_any_batch_from_its_number(data):
  """A run that goes on sees what an uninterrupted one sees, and each host its rows."""
  batches = data.train_batches(0)
  whole = [next(batches) for _ in range(40)]
  for step in (1, 17, 39):
    assert_equal(next(data.train_batches(step)), whole[step])
  for rows in (slice(0, 1), slice(1, 3)):
    part = leaves(next(data.train_batches(5, rows=rows)))
    for name, field in leaves(whole[5]).items():
      np.testing.assert_array_equal(part[name], field[rows])


def test_heldout_rows(data):
  """All documents once, by source too; bits per byte count what is learnt."""
  documents = [set(np.unique(b.documents)) - {-1} for b in heldout_batches(data.heldout, 3)]
  assert sum(map(len, documents)) >= data.heldout.documents
  assert sum(split.targets for split in data.by_source) == data.heldout.targets
  assert [split.sources[0].name for split in data.by_source] == [
    'Clips',
    'Sounds',
    'Joined',
    'Drawings',
    'Passages',
  ]
  text = data.heldout_text()
  assert data.heldout.text_bytes == len(text) - data.heldout.documents
  assert data.heldout.bits_per_byte(data.heldout.text_bytes * np.log(2)) == pytest.approx(1.0)
  assert data.faults == ()
  assert data.train.titles[3] == 'Clips 3'


def test_another_process_gets_paths_and_no_arrays(data):
  """What goes to a worker is small, and gives the same rows."""
  packed = pickle.dumps(data.train.sources)
  assert len(packed) < 50_000
  again = pickle.loads(pickle.dumps(data.train))
  assert_equal(again.batch([0, 3]), data.train.batch([0, 3]))


@pytest.mark.slow
def test_workers_give_the_same_batches(data):
  """Two processes, read in turn."""
  config = dataclasses.replace(data.config, workers=2)
  batches = dataclasses.replace(data, config=config).train_batches(2)
  expected = data.train_batches(2)
  for _ in range(5):
    assert_equal(next(batches), next(expected))
  batches.close()


def test_alone_and_marked(source, tmp_path):
  """One document a row; several, with one place for each of their media."""
  mixed = MediaCorpus(
    source=source, tokenizer=Bytes(), slots=SLOTS, length=300, layout=Alone(), batch_size=2
  )
  alone = mixed.prepare(tmp_path)
  one = dict.fromkeys(('image', 'video', 'sound'), 1)
  marked = dataclasses.replace(mixed, layout=Marked(points=2, **one)).prepare(tmp_path)
  assert {k: s.values[0] for k, s in mixed.media.items()} == {
    'image': 1,
    'video': 1,
    'sound': 1,
    'points': 2,
  }
  assert marked.config.media == mixed.media
  assert marked.train.rows < alone.train.rows
  lone = {}
  for index in range(alone.train.rows):
    batch = alone.train.batch([index])
    assert batch.segments.max() == 1
    lone[int(batch.documents[0, 0])] = batch
  for index in range(20):
    batch = marked.train.batch([index])
    for document in set(batch.documents[0].tolist()) - {-1}:
      if not marked.train.record(document).media:
        continue
      here, one = batch.documents[0] == document, lone[document]
      # Of every medium the first place is left, and it has the same number in its own row.
      slots = np.array([4 * 1, 3 * 1, 2 * 1, 5 * 2])
      firsts = np.concatenate([[0], np.cumsum(slots)])[:-1].tolist() + [14]
      kept = (one.segments[0] > 0) & (
        (one.placeholders[0] < 0) | np.isin(one.placeholders[0], firsts)
      )
      assert one.tokens[0, kept].tolist() == batch.tokens[0, here].tolist()
      assert (batch.placeholders[0, here] >= 0).sum() == len(marked.train.record(document).media)
      assert one.weights.sum() == batch.weights[0, here].sum()


def test_questions_teach_answers_only(tmp_path):
  questions = Questions(side=30, made=MADE)
  config = MediaCorpus(source=questions, tokenizer=Bytes(), slots=SLOTS, layout=Alone())
  split = config.prepare(tmp_path).heldout
  batch = split.batch(range(7))
  for line in range(7):
    document = int(batch.documents[line, 0])
    ids = batch.targets[line][batch.weights[line] > 0].tolist()
    answer = split.record(document).facts['answer']
    assert ids == [3 + b for b in f' {answer}'.encode()] + [1]


def test_a_medium_that_cannot_be_read_any_more(data, caplog, monkeypatch):
  """Its document is not in the row; the others keep their words and their media."""
  from deepseek_jax.data.media.record import UnreadableError

  def documents(batch):
    return np.unique(batch.documents[batch.documents >= 0]).tolist()

  row, lost = next(
    (row, number)
    for row in range(data.train.rows)
    for number in documents(data.train.batch([row]))
    if data.train.record(number).media
  )
  whole = data.train.batch([row])
  numbers = documents(whole)
  source, gone = data.train.where(lost)
  render = type(source.records).render

  def fail(self, split, index):
    if self is source.records and index == gone:
      raise UnreadableError('no such file')
    return render(self, split, index)

  monkeypatch.setattr(type(source.records), 'render', fail)
  batch = data.train.batch([row])
  assert documents(batch) == [n for n in numbers if n != lost]
  assert 'left out: no such file' in caplog.text
  for number in batch.documents[batch.documents >= 0]:
    np.testing.assert_array_equal(
      batch.tokens[batch.documents == number], whole.tokens[whole.documents == number]
    )


def test_rows_outside_and_wrong_fields(data, tmp_path):
  with pytest.raises(IndexError, match='outside'):
    data.train.batch([data.train.rows])
  for fields, message in [
    ({'length': 0}, '`length` is 0'),
    ({'workers': -1}, '`workers` is -1'),
    ({'shuffle_seed': -1}, '`shuffle_seed` is -1'),
  ]:
    with pytest.raises(ConfigError, match=message):
      MediaCorpus(**fields)
  with pytest.raises(ConfigError, match='`sound` is 0'):
    Slots(sound=0)
  with pytest.raises(ConfigError, match='`video` is 0'):
    Packed(video=0)
  short = MediaCorpus(source=CLIPS, tokenizer=Bytes(), length=40)
  with pytest.raises(ConfigError, match=r'length is 40, but 23 documents .* longest, Clips \d+'):
    short.prepare(tmp_path)
