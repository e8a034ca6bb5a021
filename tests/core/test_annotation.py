"""Annotations opened up, spelt, and fitted."""

import abc
import dataclasses
from typing import Annotated, Any, Literal, NewType, Optional

import numpy as np
import pytest

from deepseek_jax.core import annotation as annotations
from deepseek_jax.core.annotation import MISFIT
from deepseek_jax.core.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class A:
  x: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class B(A):
  y: int = 2


type Alias = A | None
type Both[T] = T | tuple[T, ...]
Tokens = NewType('Tokens', int)


@pytest.mark.parametrize(
  ('annotation', 'members'),
  [
    (int, (int,)),
    (int | None, (int, type(None))),
    (Optional[int], (int, type(None))),  # noqa: UP045
    (None, (type(None),)),
    (Annotated[int | str, 'note'], (int, str)),
    (Alias, (A, type(None))),
    (Alias | int | A, (A, type(None), int)),
    (Both[int], (int, tuple[int, ...])),
    (Tokens, (int,)),
    (object, (Any,)),
  ],
)
def test_expand(annotation, members):
  assert annotations.expand(annotation) == members


def test_kinds_of_a_class_include_those_derived_from_it():
  assert annotations.kinds(A | int) == {'A': A, 'B': B}
  assert annotations.kinds(B) == {'B': B}
  assert annotations.kinds(int | None | tuple[int, ...] | Any) == {}


def test_abstract_classes_are_not_kinds():
  class Shape(abc.ABC):
    @abc.abstractmethod
    def area(self): ...

  @dataclasses.dataclass(frozen=True)
  class Open(Shape):
    side: int = 1

  @dataclasses.dataclass(frozen=True)
  class Square(Open):
    def area(self):
      return self.side**2

  assert annotations.kinds(Shape) == {'Square': Square}


@pytest.mark.parametrize(
  ('annotation', 'text'),
  [
    (int | None, 'int | None'),
    (tuple[int, ...], 'tuple[int, ...]'),
    (tuple[int | None, str], 'tuple[int | None, str]'),
    (tuple[()], 'tuple[()]'),
    (Literal['a', 3], "'a' | 3"),
    (Alias, 'A | None'),
    (Any, 'Any'),
  ],
)
def test_spell(annotation, text):
  assert annotations.spell(annotation) == text


@pytest.mark.parametrize(
  ('value', 'annotation', 'kept'),
  [
    (1, float, 1.0),
    (1, int | float, 1),
    (np.int32(3), int, 3),
    (np.float32(0.5), float, 0.5),
    (np.bool_(True), bool, True),
    ([1, [2, 3]], tuple[float, tuple[int, int]], (1.0, (2, 3))),
    ((1, 2, 3), tuple, (1, 2, 3)),
    ((), tuple[int, ...], ()),
    (A(), B, A()),
    ('x', Any, 'x'),
    ('a', Literal['a', 'b'], 'a'),
  ],
)
def test_fit(value, annotation, kept):
  found = annotations.fit(value, annotation)
  assert found == kept
  assert type(found) is type(kept)


@pytest.mark.parametrize(
  ('value', 'annotation'),
  [
    (1.0, int),
    (True, int),
    (True, float),
    (1, bool),
    (None, int),
    (1, str),
    (1, A),
    ('x', A),
    (A(), int),
    (True, Literal[1]),
    ('c', Literal['a', 'b']),
    ((1, 2), tuple[int]),
    ((1, 'x'), tuple[int, ...]),
    ((1,), int),
  ],
)
def test_misfit(value, annotation):
  assert annotations.fit(value, annotation) is MISFIT


def test_annotations_that_cannot_be_resolved():
  @dataclasses.dataclass
  class Broken:
    x: 'NotThere' = 1  # noqa: F821

  with pytest.raises(ConfigError, match=r'`Broken` cannot be read.*NotThere'):
    annotations.hints(Broken)
