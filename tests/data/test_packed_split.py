"""Rows are what the plan says, and attention can be kept within documents."""

import numpy as np
import pytest

from deepseek_jax.data.cache import TokenCache
from deepseek_jax.data.packed_split import PackedSplit, heldout_batches
from deepseek_jax.data.packing import make_plan


def make_split(seed=0, documents=30, longest=40, length=16):
  """A split of random documents; bos 0, eos 1, other ids from 3."""
  generator = np.random.default_rng(seed)
  lengths = generator.integers(2, longest, documents)
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  tokens = generator.integers(3, 99, offsets[-1]).astype(np.uint16)
  tokens[offsets[:-1]], tokens[offsets[1:] - 1] = 0, 1
  cache = TokenCache(
    tokens=tokens,
    offsets=offsets,
    text_bytes=lengths * 4,
    given=np.ones(documents, np.int64),
    titles=tuple(f't{i}' for i in range(documents)),
    sources=('s',) * documents,
    fingerprint='f',
  )
  return PackedSplit(name='train', cache=cache, plan=make_plan(offsets, length, seed))


@pytest.mark.parametrize('seed', range(5))
def test_rows_against_the_documents(seed):
  """Every field of every place, from the documents themselves."""
  split = make_split(seed, length=5 + seed)
  batch = split.batch(range(split.rows))
  offsets, seen = split.cache.offsets, []
  for line in range(split.rows):
    real = batch.segments[line] > 0
    np.testing.assert_array_equal(batch.weights[line], real.astype(np.float32))
    # Padding is at the end and nowhere else.
    assert (np.diff(real.astype(int)) <= 0).all()
    for field, padding in (('tokens', 0), ('targets', 0), ('positions', 0), ('documents', -1)):
      assert (getattr(batch, field)[line][~real] == padding).all()
    segments = batch.segments[line][real]
    assert segments[0] == 1
    assert set(np.diff(segments).tolist()) <= {0, 1}
    for segment in np.unique(segments):
      here = batch.segments[line] == segment
      (document,) = set(batch.documents[line][here].tolist())
      text = split.cache.tokens[offsets[document] : offsets[document + 1]].astype(int)
      count = int(here.sum())
      np.testing.assert_array_equal(batch.positions[line][here], np.arange(count))
      inputs, targets = batch.tokens[line][here], batch.targets[line][here]
      starts = [
        start
        for start in range(0, len(text) - 1, split.length)
        if np.array_equal(text[start : start + count], inputs)
        and np.array_equal(text[start + 1 : start + count + 1], targets)
      ]
      assert starts
      seen.append(count)
  assert sum(seen) == split.targets == int(batch.weights.sum())


def test_types_and_shapes():
  """NumPy arrays of the types the step expects; a row is [T]."""
  split = make_split()
  batch, row = split.batch([3, 0]), split.row(3)
  assert (batch.media, batch.placeholders) == (None, None)
  fields = {name: field for name, field in vars(batch).items() if field is not None}
  assert len(fields) == 6
  for name, field in fields.items():
    assert isinstance(field, np.ndarray)
    assert field.shape == (2, split.length)
    assert field.dtype == (np.float32 if name == 'weights' else np.int32)
    np.testing.assert_array_equal(getattr(row, name), field[0])


def test_counts():
  """Tokens, targets and bytes are those of the documents."""
  split = make_split(documents=30)
  assert split.documents == len(split.titles) == 30
  assert split.tokens == split.cache.offsets[-1]
  assert split.targets == split.tokens - 30
  assert split.text_bytes == 4 * split.tokens
  assert split.occupancy == pytest.approx(split.targets / (split.rows * split.length))
  # One bit a byte is ln 2 nats a byte.
  assert split.bits_per_byte(split.text_bytes * np.log(2)) == pytest.approx(1.0)


def test_rows_outside_are_refused():
  """-1 is a row of padding; nothing wraps around."""
  split = make_split()
  for wrong in (-2, split.rows):
    with pytest.raises(IndexError, match='outside'):
      split.batch([wrong])


@pytest.mark.parametrize('batch_size', [1, 4, 7, 1000])
def test_heldout_batches(batch_size):
  """Every row once, in order; the last batch is filled up with rows of no weight."""
  split = make_split()
  batches = list(heldout_batches(split, batch_size))
  assert len(batches) == -(-split.rows // batch_size)
  assert all(batch.tokens.shape == (batch_size, split.length) for batch in batches)
  tokens = np.concatenate([batch.tokens for batch in batches])
  np.testing.assert_array_equal(tokens[: split.rows], split.batch(range(split.rows)).tokens)
  weights = np.concatenate([batch.weights for batch in batches])
  assert weights[: split.rows].any(1).all()
  assert not weights[split.rows :].any()
  assert weights.sum() == split.targets
