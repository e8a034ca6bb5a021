"""Differences between configs."""

import dataclasses
import math
from typing import Any

from deepseek_jax.core.difference import Change, difference


@dataclasses.dataclass(frozen=True, kw_only=True)
class A:
  x: Any = 1
  y: Any = 2
  z: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class B:
  x: Any = 1
  y: Any = 5
  w: tuple[int, ...] = dataclasses.field(default_factory=lambda: (7,))


def test_equal_configs_do_not_differ():
  assert difference(A(), A()) == []
  assert difference(A(x=math.nan), A(x=float('nan'))) == []
  assert difference(A(x=1), A(x=1.0)) == []


def test_leaves_and_nesting():
  old = A(x=A(x=1, y='a'), z=(1, 2))
  new = A(x=A(x=3, y='b'), z=(1, 5))
  assert difference(old, new) == [
    Change(path='x.x', old=1, new=3),
    Change(path='x.y', old='a', new='b'),
    Change(path='z.1', old=2, new=5),
  ]


def test_length_of_a_tuple():
  assert difference(A(z=(1,)), A(z=(1, 2))) == [Change(path='z', old=(1,), new=(1, 2))]


def test_bool_is_not_a_number():
  assert difference(A(x=True), A(x=1)) == [Change(path='x', old=True, new=1)]


def test_another_kind():
  old, new = A(x=A(x=9)), A(x=B(x=9))
  assert difference(old, new) == [
    Change(path='x', old=A(x=9), new=B(x=9), carried=('x',), defaulted=('y', 'w'))
  ]


def test_text_of_a_change():
  assert str(Change(path='model.depth', old=6, new=4)) == 'model.depth: 6 → 4'
  change = Change(path='a', old=None, new=1, carried=('x', 'y'), defaulted=('z',))
  assert str(change) == 'a: None → 1 (kept x, y; default z)'
