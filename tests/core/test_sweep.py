"""The algebra of sweeps: what it enumerates, what it is called, and what it refuses."""

import dataclasses
import itertools
import re

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.sweep import (
  SEED_PATHS,
  chain,
  list_faults,
  note_faults,
  product,
  resolve,
  seeds,
  split_seeds,
  zipped,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Near:
  """A kind."""

  size: int = 8
  sinks: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Far:
  """Another."""

  size: int = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """A part with a check of its own."""

  depth: int = 2
  reach: Near | Far | None = Near()

  def __post_init__(self):
    if self.depth < 1:
      raise ConfigError(f'`depth` is {self.depth}; expected 1 or more')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
  """Data."""

  shuffle_seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
  """A run."""

  model: Part = Part()
  other: Part = Part()
  data: Text = Text()
  rate: float = 1e-3
  seed: int = 0


def test_product_is_every_combination_in_order():
  sweep = product({'model.depth': [1, 2], 'rate': (0.1, 0.2)}, {'seed': range(2)})
  expected = [
    {'model.depth': d, 'rate': r, 'seed': s}
    for d, r, s in itertools.product([1, 2], [0.1, 0.2], [0, 1])
  ]
  assert list(sweep) == expected
  assert len(sweep) == 8
  assert list(product()) == [{}]


def test_zipped_goes_in_step():
  sweep = zipped({'model.depth': [1, 2]}, chain({'rate': 0.1, 'seed': 3}, {'rate': 0.2}))
  assert list(sweep) == [
    {'model.depth': 1, 'rate': 0.1, 'seed': 3},
    {'model.depth': 2, 'rate': 0.2},
  ]
  with pytest.raises(ConfigError, match=r'`a` has 2, `b` has 3, sweep 2 has 1'):
    zipped({'a': [1, 2], 'b': [1, 2, 3]}, chain({'c': 1}))


def test_chain_appends_and_names():
  sweep = chain({}, product({'rate': [0.1, 0.2]}), far={'model.reach': Far()}, none=seeds(2))
  assert list(sweep) == [
    {},
    {'rate': 0.1},
    {'rate': 0.2},
    {'model.reach': Far()},
    {'seed': 0, 'data.shuffle_seed': 0},
    {'seed': 1, 'data.shuffle_seed': 1},
  ]
  assert sweep.names() == (
    'base', 'rate=0.1', 'rate=0.2', 'far',
    'none,seed=0,shuffle_seed=0', 'none,seed=1,shuffle_seed=1',
  )  # fmt: skip


def test_where_keeps_what_holds():
  sweep = product({'model.depth': [1, 2, 3], 'seed': [1, 2, 3]})
  kept = sweep.where(lambda point: point['model.depth'] < point['seed'])
  assert [tuple(point.values()) for point in kept] == [(1, 2), (1, 3), (2, 3)]
  assert len(sweep) == 9


@pytest.mark.parametrize(
  ('sweep', 'names'),
  [
    (product({'model.depth': [4]}), ['depth=4']),
    (product({'model.depth': [4], 'rate': [1e-3, 3e-5]}), ['rate=0.001', 'rate=3e-05']),
    (
      product({'model.depth': [1, 2], 'other.depth': [1, 2]}),
      [f'model.depth={a},other.depth={b}' for a in (1, 2) for b in (1, 2)],
    ),
    (
      product({'model.reach': [None, Far(), Near(), Near(size=4)]}),
      ['reach=None', 'reach=Far', 'reach=Near-size=8', 'reach=Near-size=4'],
    ),
    (product({'text': ['a b/c', 'a b:c', '../x']}), ['text=a_b_c', 'text=a_b_c.2', 'text=.._x']),
    (product({'text': ['A', 'a']}), ['text=A', 'text=a.2']),
    (product({'sizes': [(1, 2), (), ((3,), 4)]}), ['sizes=1+2', 'sizes=empty', 'sizes=3+4']),
    (chain({}, {}), ['base', 'base.2']),
    (
      product(chain(a={'rate': 1.0}, b={}), {'seed': [0, 1]}),
      ['a,seed=0', 'a,seed=1', 'b,seed=0', 'b,seed=1'],
    ),
  ],
)
def test_names_say_what_differs(sweep, names):
  assert list(sweep.names()) == names


def test_names_are_fit_for_folders():
  values = ['x' * 300, 'x' * 299 + 'y', '', '~', '.', '/', 'ä', 'a\nb', '$(rm)']
  names = product({'text': values}).names()
  assert len({name.casefold() for name in names}) == len(values)
  for name in names:
    assert re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9._=,+-]{0,104}', name), name


def test_seeds_change_weights_and_order():
  assert list(seeds(2)) == [dict.fromkeys(SEED_PATHS, 0), dict.fromkeys(SEED_PATHS, 1)]
  with pytest.raises(ConfigError, match='expected 1 or more, found 0'):
    seeds(0)


def test_seeds_are_taken_out():
  sweep = product({'rate': [0.1, 0.2]}, seeds(3))
  points, found = split_seeds(sweep)
  assert list(points) == [{'rate': 0.1}, {'rate': 0.2}]
  assert found == (0, 1, 2)
  points, found = split_seeds(product(chain({}, a={'rate': 0.1}), seeds(2)))
  assert points.names() == ('base', 'a')
  assert found == (0, 1)
  assert split_seeds(chain({}, {'rate': 0.1}))[1] is None
  assert list(split_seeds(chain({}, {}))[0]) == [{}, {}]
  alone, found = split_seeds(seeds(2))
  assert (list(alone), alone.names(), found) == ([{}], ('base',), (0, 1))


@pytest.mark.parametrize(
  ('sweep', 'message'),
  [
    (product({'seed': [1, 2]}), '`seed` set by hand'),
    (chain({'seed': 1, 'data.shuffle_seed': 2}), 'set by hand'),
    (chain(dict.fromkeys(SEED_PATHS, 'one')), "'one'; expected a number"),
    (chain(seeds(2), seeds(1)), 'seed 0 occurs twice'),
    (chain({'rate': 0.1}, product({'rate': [0.2]}, seeds(2))), 'the same seeds'),
  ],
)
def test_odd_seeds_are_refused(sweep, message):
  with pytest.raises(ConfigError, match=message):
    split_seeds(sweep)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: product({'model.depth': 4}), r'`model.depth`: expected a list of values, found 4'),
    (lambda: product({'name': 'ab'}), r"write \['ab'\]"),
    (lambda: zipped({'model.reach': Far()}), 'expected a list'),
    (lambda: product({'rate': [1.0]}, chain({'rate': 2.0})), '`rate` is set twice'),
    (lambda: resolve(Whole(), chain({}).where(lambda point: False)), 'no variant'),
  ],
)
def test_what_is_no_sweep_is_refused(make, message):
  with pytest.raises(ConfigError, match=message):
    make()


def test_variants_are_whole_configs():
  base = Whole()
  first, second = resolve(base, chain({}, {'model.depth': 4, 'model.reach': Far(size=3)}))
  assert (first.name, first.config, first.changes) == ('base', base, ())
  assert second.name == 'depth=4,reach=Far'
  assert second.config == Whole(model=Part(depth=4, reach=Far(size=3)))
  assert [change.path for change in second.changes] == ['model.depth', 'model.reach']
  assert base == Whole()


def test_all_faults_of_all_variants_come_at_once():
  sweep = product({'model.depht': [1], 'rate': [0.1, 'fast']}, chain({}, low={'other.depth': 0}))
  with pytest.raises(ConfigError) as caught:
    resolve(Whole(), sweep)
  assert caught.value.messages == (
    'all 4 variants: model.depht: `Part` has no field `depht`; did you mean `depth`?',
    'rate=0.1,low, rate=fast,low: other: `depth` is 0; expected 1 or more',
    "rate=fast, rate=fast,low: rate: 'fast' is not float",
  )


def test_equal_variants_are_reported_beside_other_faults():
  sweep = chain({}, same={'rate': 1e-3}, odd={'model.depth': 'x'}, again={'model.depth': 2})
  with pytest.raises(ConfigError) as caught:
    resolve(Whole(), sweep)
  messages = caught.value.messages
  assert len(messages) == 4
  assert messages[0].startswith('odd: ')
  pairs = [('base', 'same'), ('base', 'again'), ('same', 'again')]
  assert list(messages[1:]) == [f'variants {a} and {b} are the same config' for a, b in pairs]


def test_a_fault_is_listed_once():
  faults: dict[str, list[str]] = {}
  note_faults(faults, 'a', ['one', 'two'])
  note_faults(faults, 'b', ['one'])
  assert list_faults(faults, 2) == ['all 2 variants: one', 'a: two']
  assert list_faults({'one': ['a']}, 1) == ['a: one']
