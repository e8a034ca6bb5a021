"""Overrides with objects from Python, as a notebook makes them."""

import dataclasses

import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.difference import Change
from deepseek_jax.core.override import override


def config(cls):
  return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


@config
class Dense:
  hidden: int = 32


@config
class MLA:
  heads: int = 8
  latent: int = 64


@config
class Window:
  size: int
  heads: int = 4
  latent: int | None = None


@config
class Model:
  attention: MLA | Window = dataclasses.field(default_factory=MLA)
  extra: Dense | None = None
  rates: tuple[float, ...] | None = None


@config
class Root:
  name: str = 'run'
  model: Model = dataclasses.field(default_factory=Model)
  steps: int = 100
  peak: float = 0.1


@pytest.mark.parametrize(
  ('path', 'value', 'kept'),
  [
    ('peak', 1, 1.0),
    ('peak', np.float64(0.25), 0.25),
    ('peak', np.float32(0.25), 0.25),
    ('steps', np.int64(9), 9),
    ('model.rates', [1, 0.5], (1.0, 0.5)),
    ('model.rates', None, None),
    ('name', '3', '3'),
    ('model.extra', Dense(hidden=2), Dense(hidden=2)),
    ('model.attention', 'Window(size=128)', Window(size=128, heads=8, latent=64)),
    ('model.attention', 'MLA(heads=2)', MLA(heads=2)),
  ],
)
def test_objects_from_python(path, value, kept):
  new, changes = override(Root(), {path: value})
  found = new
  for name in path.split('.'):
    found = getattr(found, name)
  assert found == kept
  assert type(found) is type(kept)
  if isinstance(kept, tuple):
    assert all(type(part) is float for part in found)
  assert len(changes) == (0 if path == 'model.rates' and kept is None else 1)


@pytest.mark.parametrize(
  ('path', 'value', 'message'),
  [
    ('steps', 2.0, 'steps: 2.0 is not int'),
    ('steps', '2', "steps: '2' is not int"),
    ('steps', True, 'steps: True is not int'),
    ('steps', None, 'steps: None is not int'),
    ('steps', MLA(), f'steps: {MLA()!r} is not int'),
    ('name', 3, 'name: 3 is not str'),
    ('model.attention', 3, 'model.attention: 3 is not one of [MLA, Window]'),
    ('model.attention', None, 'model.attention: None is not one of [MLA, Window]'),
    ('model.rates', (1, 'x'), "model.rates: (1, 'x') is not tuple[float, ...] | None"),
    ('model.rates', 0.5, 'model.rates: 0.5 is not tuple[float, ...] | None'),
  ],
)
def test_wrong_objects_from_python(path, value, message):
  with pytest.raises(ConfigError) as caught:
    override(Root(), {path: value})
  assert caught.value.messages == (message,)


def test_any_object_goes_where_objects_go():
  class Obeys:
    def build(self):
      return 'attention'

  mine = Obeys()
  new, changes = override(Root(), {'model.attention': mine})
  assert new.model.attention is mine
  assert changes == [Change(path='model.attention', old=MLA(), new=mine)]


def test_an_object_given_whole_carries_nothing():
  new, changes = override(Root(), {'model.attention': Window(size=3, heads=8)})
  assert new.model.attention == Window(size=3, heads=8)
  assert changes[0].carried == ()
  assert changes[0].defaulted == ()


def test_object_then_its_field():
  new, _ = override(Root(), {'model.attention.heads': 3, 'model.attention': Window(size=3)})
  assert new.model.attention == Window(size=3, heads=3)
