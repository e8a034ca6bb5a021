"""The pack plan loses no target, repeats none, overfills no row, and packs well."""

import time

import numpy as np
import pytest

from deepseek_jax.data.packing import best_fit, make_plan, pack_plan, split_documents


def random_offsets(generator, documents, longest):
  """Documents of at least bos and eos."""
  return np.concatenate([[0], np.cumsum(generator.integers(2, longest + 1, documents))])


def slow_best_fit(sizes, length):
  """The definition: the fullest row that has room, the last opened among equals."""
  rows, room = np.empty(len(sizes), int), []
  touched = []
  for tick, i in enumerate(sorted(range(len(sizes)), key=lambda i: -sizes[i])):
    fits = [r for r in range(len(room)) if room[r] >= sizes[i]]
    if fits:
      row = min(fits, key=lambda r: (room[r], -touched[r]))
    else:
      row = len(room)
      room.append(length)
      touched.append(0)
    room[row] -= sizes[i]
    touched[row] = tick
    rows[i] = row
  return rows


@pytest.mark.parametrize('seed', range(12))
def test_every_target_exactly_once(seed):
  """Over all pieces of all rows, for odd lengths too."""
  generator = np.random.default_rng(seed)
  length = int(generator.choice([1, 2, 7, 33, 64]))
  offsets = random_offsets(generator, int(generator.integers(1, 60)), int(3 * length + 5))
  plan = make_plan(offsets, length, seed)
  seen = np.zeros(offsets[-1], int)
  for start, count, document in plan.pieces:
    assert 1 <= count <= length
    assert offsets[document] <= start
    assert start + count + 1 <= offsets[document + 1]
    seen[start + 1 : start + count + 1] += 1
  expected = np.ones(offsets[-1], int)
  expected[offsets[:-1]] = 0  # no bos is a target
  np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize('seed', range(12))
def test_rows_are_neither_overfull_nor_empty(seed):
  """And the plan's occupancy is what was counted."""
  generator = np.random.default_rng(100 + seed)
  length = int(generator.integers(1, 50))
  offsets = random_offsets(generator, 80, 2 * length + 2)
  plan = make_plan(offsets, length, seed)
  filled = np.add.reduceat(plan.pieces[:, 1], plan.rows[:-1])
  assert (np.diff(plan.rows) > 0).all()
  assert filled.max() <= length
  assert plan.rows[-1] == len(plan.pieces)
  assert plan.occupancy == pytest.approx(filled.sum() / (len(filled) * length))


@pytest.mark.parametrize('seed', range(20))
def test_best_fit_is_the_definition(seed):
  """Against the slow one."""
  generator = np.random.default_rng(seed)
  length = int(generator.integers(1, 40))
  sizes = generator.integers(1, length + 1, int(generator.integers(1, 120)))
  np.testing.assert_array_equal(best_fit(sizes, length), slow_best_fit(sizes.tolist(), length))


def test_pieces_of_a_long_document():
  """All but the last are full; the document of two tokens has one target."""
  np.testing.assert_array_equal(
    split_documents(np.array([0, 12, 14, 19]), 4),
    [[0, 4, 0], [4, 4, 0], [8, 3, 0], [12, 1, 1], [14, 4, 2]],
  )


def test_packing_is_tight():
  """Short pieces fill nearly every row: best-fit decreasing is within 11/9 of the best."""
  generator = np.random.default_rng(0)
  plan = make_plan(random_offsets(generator, 5000, 300), 512, 0)
  assert plan.occupancy > 0.99


def test_seed_moves_equal_pieces_only():
  """Another seed, another plan, as many rows."""
  offsets = random_offsets(np.random.default_rng(1), 400, 20)
  plans = [make_plan(offsets, 16, seed) for seed in (0, 0, 1)]
  np.testing.assert_array_equal(plans[0].pieces, plans[1].pieces)
  assert (plans[0].pieces != plans[2].pieces).any()
  np.testing.assert_array_equal(np.sort(plans[0].pieces, 0), np.sort(plans[2].pieces, 0))
  assert len(plans[0].rows) == len(plans[2].rows)


def test_plan_is_kept(tmp_path):
  """One entry for each length and seed, memory-mapped."""
  offsets = random_offsets(np.random.default_rng(2), 50, 30)
  for length, seed in ((8, 0), (8, 1), (9, 0), (8, 0)):
    plan = pack_plan(offsets, 'tokens', length, seed, tmp_path)
    expected = make_plan(offsets, length, seed)
    assert isinstance(plan.pieces, np.memmap)
    np.testing.assert_array_equal(plan.pieces, expected.pieces)
    np.testing.assert_array_equal(plan.rows, expected.rows)
  assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_a_million_pieces():
  """Seconds, not hours."""
  offsets = random_offsets(np.random.default_rng(3), 1_000_000, 4096)
  start = time.process_time()
  assert make_plan(offsets, 4096, 0).occupancy > 0.99
  assert time.process_time() - start < 60
