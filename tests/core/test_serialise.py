"""Round trips: JSON, Python source, command line; and the digest."""

import dataclasses
import json
import math
import random
import subprocess
import sys
from typing import Any

import pytest

from deepseek_jax.core import precision
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.difference import difference
from deepseek_jax.core.override import override_from_text
from deepseek_jax.core.serialise import (
  digest,
  from_json,
  namespace,
  to_json,
  to_module,
  to_python,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
  count: int = 1
  rate: float = 0.5
  flag: bool = True
  name: str = 'x'
  maybe: int | None = None

  def __post_init__(self):
    if self.count == 13:
      raise ConfigError('count: 13 is refused')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
  left: 'Node'
  right: 'Node | None' = None
  many: 'tuple[Node, ...]' = ()
  numbers: tuple[float, ...] = ()
  pairs: tuple[tuple[int, str], ...] = ()


type Node = Leaf | Branch


class Outer:
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Inner:
    x: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float32:
  """Shares its name with the precision."""

  x: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
  value: Any = None
  other: Any = None


def random_float(rng):
  return rng.choice([0.0, -0.0, 1.5, 3e-4, 1e300, math.inf, -math.inf, rng.random()])


def random_text(rng):
  return ''.join(rng.choice('aé\'"\\\n\t{},=( )☃#') for _ in range(rng.randrange(12)))


def random_tree(rng, depth):
  if depth == 0 or rng.random() < 0.3:
    return Leaf(
      count=rng.randrange(-5, 10) * 10 ** rng.randrange(20),
      rate=random_float(rng),
      flag=rng.random() < 0.5,
      name=random_text(rng),
      maybe=rng.choice([None, 0, 7]),
    )
  return Branch(
    left=random_tree(rng, depth - 1),
    right=random_tree(rng, depth - 1) if rng.random() < 0.5 else None,
    many=tuple(random_tree(rng, depth - 1) for _ in range(rng.randrange(3))),
    numbers=tuple(random_float(rng) for _ in range(rng.randrange(4))),
    pairs=tuple((rng.randrange(9), random_text(rng)) for _ in range(rng.randrange(3))),
  )


@pytest.mark.parametrize('seed', range(30))
def test_round_trips(seed):
  tree = random_tree(random.Random(seed), 4)
  text = json.dumps(to_json(tree), allow_nan=False)
  assert from_json(json.loads(text)) == tree
  source = to_python(tree)
  assert eval(source, namespace(tree)) == tree
  assert digest(from_json(json.loads(text))) == digest(tree)
  # What is printed can be typed back at the command line.
  start = Branch(left=Leaf(), right=Branch(left=Leaf(count=3)))
  new, _ = override_from_text(start, {'left': source})
  assert new.left == tree


def test_nan_survives():
  tree = Leaf(rate=math.nan)
  assert difference(from_json(json.loads(json.dumps(to_json(tree)))), tree) == []
  assert difference(eval(to_python(tree), namespace(tree)), tree) == []


def test_json_names_the_kind_and_every_field():
  data = to_json(Holder(value=precision.BFloat16(), other=(1, (2.5, 'x'), math.inf)))
  assert data == {
    'kind': f'{__name__}:Holder',
    'value': {'kind': 'deepseek_jax.core.precision:BFloat16'},
    'other': [1, [2.5, 'x'], {'kind': 'float', 'value': 'inf'}],
  }
  assert to_json(Outer.Inner())['kind'] == f'{__name__}:Outer.Inner'
  assert from_json(to_json(Outer.Inner(x=4))) == Outer.Inner(x=4)


def test_python_is_short_where_it_fits_and_indented_where_not():
  assert to_python(Leaf()) == "Leaf(count=1, rate=0.5, flag=True, name='x', maybe=None)"
  long = Branch(left=Leaf(name='n' * 30), many=(Leaf(), Leaf()), numbers=(math.inf,))
  assert to_python(long).splitlines() == [
    'Branch(',
    f"  left=Leaf(count=1, rate=0.5, flag=True, name='{'n' * 30}', maybe=None),",
    '  right=None,',
    '  many=(',
    "    Leaf(count=1, rate=0.5, flag=True, name='x', maybe=None),",
    "    Leaf(count=1, rate=0.5, flag=True, name='x', maybe=None),",
    '  ),',
    "  numbers=(float('inf'),),",
    '  pairs=(),',
    ')',
  ]


def test_two_kinds_of_one_name_are_written_in_full():
  both = Holder(value=Float32(), other=precision.Float32())
  source = to_python(both)
  assert 'other=deepseek_jax.core.precision.Float32()' in source
  assert f'value={__name__}.Float32(x=2)' in source
  assert eval(source, namespace(both)) == both
  alone = Holder(value=precision.Float32())
  assert 'value=Float32()' in to_python(alone)
  assert eval(to_python(alone), namespace(alone)) == alone


def test_kinds_made_in_functions_can_be_spelt():
  @dataclasses.dataclass(frozen=True)
  class Local:
    x: int = 3

  assert to_python(Local()) == 'Local(x=3)'
  assert eval(to_python(Local(5)), namespace(Local())) == Local(5)


def test_module_is_a_config_file(tmp_path):
  config = precision.BFloat16()
  source = to_module(config)
  assert source == (
    'from deepseek_jax.core.precision import BFloat16\n\n\n'
    'def get_config() -> BFloat16:\n  return BFloat16()\n'
  )
  scope: dict[str, Any] = {}
  exec(source, scope)
  assert scope['get_config']() == config


def test_absent_fields_take_the_defaults():
  data = to_json(Leaf(count=5, rate=0.1))
  del data['rate']
  assert from_json(data) == Leaf(count=5)


def leaf_with(**fields):
  return {**to_json(Leaf()), **fields}


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    ({}, "this is not a saved config: it is no mapping with a 'kind'"),
    ({'kind': 'nowhere'}, '`nowhere` does not name a kind; expected `module:Name`'),
    (
      {'kind': 'deepseek_jax.core.nothing:X'},
      '`deepseek_jax.core.nothing:X` is not known here: '
      "No module named 'deepseek_jax.core.nothing'",
    ),
    (
      {'kind': 'deepseek_jax.core.precision:BFloat6'},
      '`deepseek_jax.core.precision` has no kind `BFloat6`; did you mean `BFloat16`?',
    ),
    ({'kind': 'os:system'}, '`os` has no kind `system`'),
    ({'kind': 'pathlib:PurePath'}, '`pathlib:PurePath` is not a dataclass'),
    (leaf_with(cuont=1), 'cuont: `Leaf` has no field `cuont`; did you mean `count`?'),
    (leaf_with(count=1.5), 'count: 1.5 is not int'),
    (leaf_with(count=13), 'count: 13 is refused'),
    ({'kind': f'{__name__}:Branch'}, '`Branch` needs a value for `left`'),
    (
      {'kind': f'{__name__}:Branch', 'left': leaf_with(rate='fast')},
      "left.rate: 'fast' is not float",
    ),
    (
      {'kind': f'{__name__}:Branch', 'left': to_json(Leaf()), 'numbers': [1, 'x']},
      "numbers: (1, 'x') is not tuple[float, ...]",
    ),
    (
      {'kind': f'{__name__}:Branch', 'left': to_json(Leaf()), 'many': [leaf_with(count=13)]},
      'many.0: count: 13 is refused',
    ),
  ],
)
def test_json_that_is_wrong(data, message):
  with pytest.raises(ConfigError) as caught:
    from_json(data)
  assert caught.value.messages == (message,)


def test_all_faults_of_json_at_once():
  data = {
    'kind': f'{__name__}:Branch',
    'left': leaf_with(count='x', extra=1),
    'right': {'kind': f'{__name__}:Laef'},
  }
  with pytest.raises(ConfigError) as caught:
    from_json(data)
  assert set(caught.value.messages) == {
    "left.count: 'x' is not int",
    'left.extra: `Leaf` has no field `extra`; it has count, rate, flag, name, maybe',
    f'right: `{__name__}` has no kind `Laef`; did you mean `Leaf`?',
  }


def test_objects_that_cannot_be_saved():
  with pytest.raises(ConfigError) as caught:
    to_json(Holder(value=object(), other=(1, len)))
  assert caught.value.messages == (
    'value: an object of object cannot be saved; make it a frozen dataclass',
    'other.1: an object of builtin_function_or_method cannot be saved; make it a frozen dataclass',
  )
  with pytest.raises(ConfigError, match='3 is not a config'):
    to_json(3)


def test_a_field_called_kind_is_refused():
  @dataclasses.dataclass(frozen=True)
  class Bad:
    kind: str = 'x'

  with pytest.raises(ConfigError, match='kind: `Bad` must not call a field `kind`'):
    to_json(Bad())


def test_digest():
  assert digest(Leaf()) == digest(Leaf())
  assert len(digest(Leaf())) == 12
  assert digest(Leaf()) != digest(Leaf(count=2))
  assert digest(Holder(value=Leaf())) != digest(Holder(other=Leaf()))
  assert digest(precision.Float32()) != digest(precision.BFloat16())
  assert digest(Leaf(rate=1.0)) == digest(Leaf(rate=1))  # equal configs
  assert digest(Leaf(maybe=1)) != digest(Leaf(maybe=None))


def test_digest_is_the_same_in_another_process():
  code = (
    'from deepseek_jax.core import precision, serialise\n'
    'print(serialise.digest(precision.BFloat16()))'
  )
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == digest(precision.BFloat16())
