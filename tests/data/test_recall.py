"""Made-up rows: every question has one answer in the row, and any row comes from its number."""

import dataclasses

import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.packed_split import heldout_batches
from deepseek_jax.data.recall import MultiQuery, Needle, Recall, Scattered
from deepseek_jax.data.symbols import SPECIALS, Symbols

SIZES = {'keys': 9, 'values': 5, 'noise': 3, 'batch_size': 4, 'heldout_rows': 7, 'train_rows': 30}
TASKS = {
  'first': (MultiQuery(pairs=4, questions=4), 45),
  'tight': (MultiQuery(pairs=5, questions=5, power=1.0), 21),
  'again': (MultiQuery(pairs=3, questions=17), 45),
  'few': (MultiQuery(pairs=4, questions=2), 37),
  'scattered': (Scattered(pairs=4, questions=9), 45),
  'tight_scattered': (Scattered(pairs=3, questions=5), 21),
  'tight_pairs': (Scattered(pairs=5, questions=2), 22),
  'needles': (Needle(pairs=4), 37),
  'tight_needles': (Needle(pairs=5), 21),
  'even': (Needle(pairs=1), 8),
}


@pytest.fixture(params=TASKS)
def config(request) -> Recall:
  """Rows of every kind, some with no place to spare."""
  task, length = TASKS[request.param]
  return Recall(task=task, length=length, **SIZES)


def test_every_answer_is_in_the_row(config, tmp_path):
  """The target after a key's second coming is what came after its first."""
  split = config.prepare(tmp_path).train
  batch = split.batch([*range(30), -1])
  asked = 0
  for line in range(30):
    tokens, targets = batch.tokens[line].tolist(), batch.targets[line].tolist()
    assert tokens[1:] == targets[:-1]
    places = np.flatnonzero(batch.weights[line])
    assert len(places) == config.task.questions
    keys = [tokens[place] for place in places]
    assert len(set(keys)) == min(config.task.pairs, config.task.questions)
    for place in places:
      key = tokens[place]
      assert SPECIALS <= key < SPECIALS + config.keys
      first = tokens.index(key)
      assert first < place - 1
      assert not batch.weights[line, first]
      assert targets[first] == targets[place]
      assert config.keys <= targets[place] - SPECIALS < config.keys + config.values
      asked += 1
  assert asked == split.targets
  np.testing.assert_array_equal(batch.segments[:, 0], [1] * 30 + [0])
  assert not batch.weights[30].any()
  assert batch.documents[30].max() == -1
  assert list(tmp_path.iterdir()) == []


def test_layouts():
  """Pairs first and asked for soon; or needles anywhere, asked for at the end."""
  split = Recall(task=MultiQuery(pairs=4, questions=4), length=205, **SIZES).prepare(None).train
  layouts = [split.row(n)[1] for n in range(30)]
  assert all(layout.given.tolist() == [1, 3, 5, 7] for layout in layouts)
  places = np.concatenate([layout.asked for layout in layouts])
  assert np.mean(places < 40) > 0.5
  assert places.max() > 150
  split = Recall(task=Needle(pairs=4), length=205, **SIZES).prepare(None).train
  layouts = [split.row(n)[1] for n in range(30)]
  assert all(layout.asked.tolist() == [197, 199, 201, 203] for layout in layouts)
  places = np.concatenate([layout.given for layout in layouts])
  assert places.min() < 20
  assert places.max() > 180
  assert abs(places.mean() - 99) < 25
  task = Scattered(pairs=4, questions=40)
  split = Recall(task=task, length=205, **SIZES).prepare(None).train
  layouts = [split.row(n)[1] for n in range(30)]
  for name, low, high in (('given', 1, 101), ('asked', 103, 203)):
    places = np.concatenate([getattr(layout, name) for layout in layouts])
    assert (places.min(), places.max()) == (low, high)
    assert abs(places.mean() - (low + high) / 2) < 10


def test_rows_depend_on_split_seed_and_number():
  """Held-out rows are the same for every seed, and none is a training row."""
  config = Recall(length=80, task=MultiQuery(pairs=3, questions=3), **SIZES)
  first, second = (dataclasses.replace(config, shuffle_seed=s).prepare(None) for s in (0, 1))
  rows = [tuple(first.train.row(n)[0]) for n in range(30)]
  assert rows == [tuple(first.train.row(n)[0]) for n in range(30)]
  assert len(set(rows)) == 30
  assert not set(rows) & {tuple(second.train.row(n)[0]) for n in range(30)}
  held = [tuple(first.heldout.row(n)[0]) for n in range(7)]
  assert held == [tuple(second.heldout.row(n)[0]) for n in range(7)]
  assert not set(rows) & set(held)
  batches = list(heldout_batches(first.heldout, 4))
  assert [int((batch.segments[:, 0] > 0).sum()) for batch in batches] == [4, 3]
  with pytest.raises(IndexError, match='row 7 is outside the 7 rows of heldout'):
    first.heldout.batch([7])


def test_training_batches_go_on_where_they_were():
  """Batch k is the same whether or not those before it were read."""
  data = Recall(length=80, task=MultiQuery(pairs=3, questions=3), **SIZES).prepare(None)
  batches = data.train_batches(0)
  for _ in range(9):
    last = next(batches)
  np.testing.assert_array_equal(next(data.train_batches(8)).tokens, last.tokens)


def test_bits_an_answer():
  split = Recall(length=80, task=MultiQuery(pairs=3, questions=3), **SIZES).prepare(None).heldout
  assert split.targets == 21
  assert split.bits_per_byte(21 * np.log(5)) == pytest.approx(np.log2(5))


def test_symbols():
  """Numbers to ids and back."""
  tokenizer = Symbols(12).build()
  assert tokenizer.vocab_size == 15
  ids = tokenizer.encode('0 11 7')
  assert ids.tolist() == [3, 14, 10]
  assert tokenizer.decode([0, *ids, 1]) == '0 11 7 '
  assert tokenizer.fingerprint != Symbols(13).build().fingerprint
  for text in ('12', 'x', '-1'):
    with pytest.raises(ConfigError, match='expected a number from 0 to 11'):
      tokenizer.encode(text)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'keys': 3, 'task': Needle(pairs=4)}, 'Recall.keys: expected at least task.pairs, 4'),
    ({'length': 16, 'task': Needle(pairs=4)}, 'Recall.length: expected at least 17'),
    ({'values': 0}, 'Recall.values: expected at least 1, found 0'),
    ({'shuffle_seed': -1}, 'Recall.shuffle_seed: expected 0 to'),
  ],
)
def test_wrong_fields(fields, message):
  with pytest.raises(ConfigError, match=message):
    Recall(**fields)


def test_wrong_tasks():
  with pytest.raises(ConfigError, match=r'MultiQuery.power: expected above 0 .* found 0'):
    MultiQuery(power=0)
  with pytest.raises(ConfigError, match=r'MultiQuery.questions: expected at least 1, found 0'):
    MultiQuery(questions=0)
  with pytest.raises(ConfigError, match=r'Needle.pairs: expected at least 1, found 0'):
    Needle(pairs=0)
