"""Drafts: built once, from the inside out, with everything that is wrong reported."""

import dataclasses

import pytest

from deepseek_jax.core.draft import (
  FAILED,
  MISSING,
  Draft,
  Items,
  Report,
  become,
  finish,
  join,
  kind_of,
  open_draft,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class A:
  x: int = 1
  y: int | None = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class B:
  x: int
  y: int = 5
  z: tuple[int, ...] = dataclasses.field(default_factory=lambda: (1,))


@pytest.mark.parametrize(
  ('value', 'kind'), [(A(), A), (Draft(B, {}), B), (Items([]), None), (None, None), (A, None)]
)
def test_kind_of(value, kind):
  assert kind_of(value) is kind


def test_an_untouched_draft_is_its_origin():
  origin = A(x=3)
  assert finish(open_draft(origin), '', Report()) is origin


def test_become():
  draft = become(B, A(x=7))
  assert draft.values == {'x': 7, 'y': 5, 'z': (1,)}
  assert (draft.carried, draft.defaulted) == (['x'], ['y', 'z'])
  draft.give('z', (2,))
  report = Report()
  assert finish(draft, 'part', report) == B(x=7, z=(2,))
  assert report.changes == {'part': (('x',), ('y',))}
  assert become(B, draft) is draft
  assert become(B, MISSING).values == {'y': 5, 'z': (1,)}


def test_faults_are_found_in_all_parts():
  report = Report()
  value = Items([Draft(B, {}), Draft(A, {'x': Draft(B, {'y': 1})}), 3])
  assert finish(value, 'parts', report) is FAILED
  assert [fault.split(':')[0] for fault in report.faults] == [
    'parts.0',
    'parts.1.x',
    'parts.1',
  ]


def test_join():
  assert join('', 'a') == 'a'
  assert join('a', 3) == 'a.3'
