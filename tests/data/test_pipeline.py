"""Any batch of a run from its number alone, on any number of hosts."""

import subprocess
import sys

import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.packed_split import PackedSplit
from deepseek_jax.data.pipeline import TextCorpus, train_batches
from deepseek_jax.data.source import Embedded, TextFiles
from deepseek_jax.data.tokenizer import BPE, Bytes

QUITTER = """
import pathlib, sys
from deepseek_jax.data import Bytes, TextCorpus, TextFiles

corpus = TextCorpus(source=TextFiles(sys.argv[1]), tokenizer=Bytes(), length=16, batch_size=2)
batches = corpus.prepare(pathlib.Path(sys.argv[2])).train_batches(0)
print(next(batches).tokens.shape, flush=True)
"""


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """A small corpus of bytes: about 60 rows of 32 in batches of 6, so that epochs straddle them."""
  folder = tmp_path_factory.mktemp('text')
  for i in range(40):
    (folder / f'{i:02}.txt').write_text(f'{i} blind mice; ' * (1 + i % 7), encoding='utf-8')
  corpus = TextCorpus(
    source=TextFiles(str(folder / '*.txt'), heldout_fraction=0.2),
    tokenizer=Bytes(),
    length=32,
    batch_size=6,
    shuffle_seed=3,
  )
  return corpus.prepare(folder / 'cache')


def take(batches, count):
  """The next few batches."""
  return [next(batches) for _ in range(count)]


def assert_equal(batches, expected):
  """Every field of every batch."""
  assert len(batches) == len(expected) > 0
  for found, wanted in zip(batches, expected):
    for name, field in vars(wanted).items():
      np.testing.assert_array_equal(getattr(found, name), field)


def test_every_epoch_has_every_row_once_in_another_order(data):
  """Two epochs, taken apart."""
  rows, size = data.train.rows, 6
  assert rows % size
  batches = take(data.train_batches(0), 2 * rows // size + 1)
  lines = np.concatenate([batch.tokens for batch in batches])
  epochs = [[row.tobytes() for row in lines[k * rows : (k + 1) * rows]] for k in (0, 1)]
  everything = sorted(row.tobytes() for row in data.train.batch(range(rows)).tokens)
  assert [sorted(epoch) for epoch in epochs] == [everything] * 2
  assert epochs[0] != epochs[1]
  assert epochs[0] != [row.tobytes() for row in data.train.batch(range(rows)).tokens]


@pytest.mark.parametrize('step', [1, 5, 9, 10, 11, 23])
def test_starting_at_a_step_is_skipping_to_it(data, step):
  """Within an epoch, at its border, and beyond it."""
  assert data.train.rows < 6 * 20
  whole = take(data.train_batches(0), step + 3)
  assert_equal(take(data.train_batches(step), 3), whole[step:])


def test_batches_do_not_depend_on_the_reader(data):
  """Two iterators at once, read at different speeds."""
  first, second = data.train_batches(2), data.train_batches(2)
  expected = take(first, 8)
  assert_equal(take(second, 8), expected)


@pytest.mark.parametrize('hosts', [1, 2, 3, 6])
def test_hosts_read_their_rows(data, hosts):
  """Put together they are the batch."""
  share = 6 // hosts
  expected = take(data.train_batches(7), 6)
  parts = [
    take(data.train_batches(7, rows=slice(h * share, (h + 1) * share)), 6) for h in range(hosts)
  ]
  names = [name for name, field in vars(expected[0]).items() if field is not None]
  assert len(names) == 6
  for name in names:
    found = [np.concatenate([getattr(part, name) for part in step]) for step in zip(*parts)]
    np.testing.assert_array_equal(found, [getattr(batch, name) for batch in expected])


def test_hosts_read_only_their_rows(data):
  """Work is divided, not repeated."""
  asked = []

  class Counting(PackedSplit):
    def batch(self, indices):
      indices = list(indices)
      asked.append(len(indices))
      return super().batch(indices)

  split = Counting(name='train', cache=data.train.cache, plan=data.train.plan)
  take(train_batches(split, 0, batch_size=6, seed=0, rows=slice(2, 4)), 3)
  assert set(asked) == {2}


def test_batches_of_one_row(data):
  """Far into training too."""
  for step in (0, 1_000_000):
    batches = train_batches(data.train, step, batch_size=1, seed=0)
    assert next(batches).tokens.shape == (1, 32)


def test_batch_larger_than_the_corpus(data):
  """Holds several epochs."""
  rows = data.train.rows
  batch = next(train_batches(data.train, 0, batch_size=2 * rows + 1, seed=0))
  everything = sorted(row.tobytes() for row in data.train.batch(range(rows)).tokens)
  for part in (batch.tokens[:rows], batch.tokens[rows : 2 * rows]):
    assert sorted(row.tobytes() for row in part) == everything


def test_seed_decides_the_order(data):
  """The same seed the same batches."""
  batches = [take(train_batches(data.train, 0, batch_size=4, seed=s), 3) for s in (1, 1, 2)]
  assert_equal(batches[0], batches[1])
  assert (batches[0][0].tokens != batches[2][0].tokens).any()


def test_heldout_does_not_depend_on_the_seed(data, tmp_path):
  """So that runs compare."""
  corpus = data.config
  other = TextCorpus(source=corpus.source, tokenizer=Bytes(), length=32, shuffle_seed=9)
  other_data = other.prepare(tmp_path)
  np.testing.assert_array_equal(other_data.heldout.plan.pieces, data.heldout.plan.pieces)
  assert (np.array(other_data.train.plan.pieces) != data.train.plan.pieces).any()


def test_wrong_steps_and_rows(data):
  """Refused before anything is read."""
  with pytest.raises(ValueError, match='step'):
    data.train_batches(-1)
  with pytest.raises(ValueError, match='rows'):
    data.train_batches(0, rows=slice(6, 8))


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'length': 0}, r'length: expected at least 1, found 0'),
    ({'batch_size': 0}, 'batch_size'),
    ({'shuffle_seed': -1}, 'shuffle_seed'),
    ({'shuffle_seed': 2**32}, 'shuffle_seed'),
  ],
)
def test_refuses(arguments, message):
  """All faults of the object at once, by field."""
  with pytest.raises(ConfigError, match=message):
    TextCorpus(**arguments)
  with pytest.raises(ConfigError) as caught:
    TextCorpus(length=0, batch_size=0)
  assert len(caught.value.messages) == 2


def test_config_is_hashable_and_its_repr_is_python():
  """As every config is."""
  corpus = TextCorpus(source=TextFiles('a/**/*.txt'), tokenizer=BPE())
  names = {'TextCorpus': TextCorpus, 'TextFiles': TextFiles, 'BPE': BPE}
  assert eval(repr(corpus), names) == corpus
  assert hash(corpus) == hash(eval(repr(corpus), names))


def test_leaving_in_the_middle_does_not_hang(data, tmp_path):
  """Threads that read ahead end with the interpreter."""
  command = [sys.executable, '-W', 'error', '-c', QUITTER, data.config.source.pattern]
  done = subprocess.run(
    [*command, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == '(2, 16)\n'
  assert not done.stderr


def test_embedded_corpus_end_to_end(tmp_path):
  """The shipped text with the shipped tokenizer, from files to a batch and back to text."""
  data = TextCorpus(source=Embedded(sources=('moby_dick',)), length=128).prepare(tmp_path)
  assert data.heldout.text_bytes == 25_359
  assert data.train.occupancy > 0.98
  assert 3.5 < data.train.text_bytes / data.train.targets < 5
  batch = next(data.train_batches(0))
  assert batch.tokens.shape == (16, 128)
  texts = {document.title: document.text for document in data.config.source.documents('train')}
  for line in range(16):
    first = batch.segments[line] == 1
    title = data.train.titles[batch.documents[line][0]]
    assert data.tokenizer.decode(batch.tokens[line][first]) in texts[title]
