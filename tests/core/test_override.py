"""Overrides of a tree: order, validation, changes of kind, objects from Python."""

import dataclasses
import itertools
from typing import Any

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.difference import Change
from deepseek_jax.core.override import override, override_from_text


def config(cls):
  return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


@config
class Dense:
  hidden: int = 32

  def __post_init__(self):
    if self.hidden < 1:
      raise ConfigError(f'hidden: {self.hidden} is not positive')


@config
class MoE:
  experts: int = 16
  top_k: int = 2
  hidden: int = 8
  groups: int | None = None

  def __post_init__(self):
    faults = []
    if self.top_k > self.experts:
      faults.append(f'top_k: {self.top_k} is more than experts = {self.experts}')
    if self.groups is not None and self.experts % self.groups:
      faults.append(f'groups: {self.groups} does not divide experts = {self.experts}')
    if faults:
      raise ConfigError(faults)

  @property
  def active(self) -> int:
    return self.top_k * self.hidden


@config
class MLA:
  heads: int = 8
  latent: int = 64
  scale: float = 1.0


@config
class Window:
  size: int
  heads: int = 4
  latent: int | None = None
  scale: int = 7


@config
class Model:
  depth: int = 6
  width: int = 256
  attention: MLA | Window = dataclasses.field(default_factory=MLA)
  feed_forward: Dense | MoE = dataclasses.field(default_factory=MoE)
  extra: Dense | None = None
  layers: tuple[MLA | Window, ...] = ()
  rates: tuple[float, ...] | None = None

  def __post_init__(self):
    if self.width % 2:
      raise ConfigError(f'width: {self.width} is odd')


@config
class Small:
  depth: int = 2
  feed_forward: Dense | MoE = dataclasses.field(default_factory=Dense)
  attention: MLA | Window | None = None


@config
class Root:
  name: str = 'run'
  model: Model | Small = dataclasses.field(default_factory=Model)
  steps: int = 100
  peak: float = 0.1

  def __post_init__(self):
    if self.model.depth > self.steps:
      raise ConfigError('the model is deeper than the run is long')


def test_plain_fields():
  old = Root()
  new, changes = override_from_text(old, {'model.depth': '4', 'peak': '3e-4', 'name': 'first'})
  assert new == Root(name='first', model=Model(depth=4), peak=3e-4)
  assert old == Root()
  assert changes == [
    Change(path='name', old='run', new='first'),
    Change(path='model.depth', old=6, new=4),
    Change(path='peak', old=0.1, new=3e-4),
  ]


def test_what_is_not_touched_is_the_same_object():
  old = Root()
  new, _ = override_from_text(old, {'model.depth': '4'})
  assert new.model.attention is old.model.attention
  same, changes = override_from_text(old, {'model.depth': '6', 'model.attention': 'MLA'})
  assert same == old
  assert changes == []
  assert override(old, {}) == (old, [])


def test_same_kind_keeps_the_fields_that_are_not_given():
  old = Root(model=Model(attention=MLA(heads=2, latent=16)))
  new, changes = override_from_text(old, {'model.attention': 'MLA(heads=4)'})
  assert new.model.attention == MLA(heads=4, latent=16)
  assert changes == [Change(path='model.attention.heads', old=2, new=4)]


def test_change_of_kind_carries_fields_of_the_same_name_and_type():
  old = Root(model=Model(attention=MLA(heads=2, latent=16, scale=0.5)))
  new, changes = override_from_text(old, {'model.attention': 'Window(size=128)'})
  # scale is a float in one and an int in the other: not the same thing, so the default.
  assert new.model.attention == Window(size=128, heads=2, latent=16, scale=7)
  assert changes == [
    Change(
      path='model.attention',
      old=old.model.attention,
      new=new.model.attention,
      carried=('heads', 'latent'),
      defaulted=('scale',),
    )
  ]
  assert 'kept heads, latent; default scale' in str(changes[0])


def test_an_optional_value_does_not_carry_into_a_required_type():
  old = Root(model=Model(attention=Window(size=1, latent=5)))
  new, changes = override_from_text(old, {'model.attention': 'MLA'})
  assert new.model.attention == MLA(heads=4)
  assert changes[0].carried == ('heads',)
  assert changes[0].defaulted == ('latent', 'scale')


def test_required_field_left_open():
  with pytest.raises(ConfigError, match=r'^model\.attention: `Window` needs a value for `size`$'):
    override_from_text(Root(), {'model.attention': 'Window(heads=2)'})


def test_required_field_given_by_its_own_path():
  assignments = {'model.attention.size': '9', 'model.attention': 'Window'}
  new, changes = override_from_text(Root(), assignments)
  assert new.model.attention == Window(size=9, heads=8, latent=64)
  assert changes[0].carried == ('heads', 'latent')
  assert 'size' not in changes[0].carried + changes[0].defaulted


def test_nested_change_of_kind_is_reported_with_its_path():
  text = 'Small(attention=Window(3), depth=1)'
  new, changes = override_from_text(Root(), {'model': text})
  assert new.model == Small(
    depth=1, attention=Window(size=3, heads=8, latent=64), feed_forward=MoE()
  )
  (change,) = changes
  assert change.path == 'model'
  assert set(change.carried) == {'feed_forward', 'attention.heads', 'attention.latent'}
  assert change.defaulted == ('attention.scale',)


ASSIGNMENTS = {
  'model': 'Model(width=8)',
  'model.feed_forward': 'MoE(top_k=20)',
  'model.feed_forward.experts': '64',
  'model.attention': 'Window',
  'model.attention.size': '5',
}


def test_order_does_not_matter():
  wanted = Model(
    width=8,
    feed_forward=MoE(top_k=20, experts=64),
    attention=Window(size=5, heads=8, latent=64),
  )
  for order in itertools.permutations(ASSIGNMENTS):
    new, _ = override_from_text(Root(), {path: ASSIGNMENTS[path] for path in order})
    assert new.model == wanted, order


@pytest.mark.parametrize('order', [('experts', 'top_k', 'groups'), ('groups', 'top_k', 'experts')])
def test_validation_sees_whole_objects_only(order):
  # 16 experts → 3: with top_k = 2 and groups = 8, every order but all-at-once would be refused.
  old = Root(model=Model(feed_forward=MoE(groups=8)))
  values = {'experts': 3, 'top_k': 3, 'groups': 3}
  new, _ = override(old, {f'model.feed_forward.{name}': values[name] for name in order})
  assert new.model.feed_forward == MoE(experts=3, top_k=3, groups=3)


def test_an_object_is_built_once():
  built = []

  @config
  class Counted:
    a: int = 1
    b: int = 2
    inner: 'Any' = None

    def __post_init__(self):
      built.append((self.a, self.b))

  old = Counted()
  built.clear()
  override(old, {'a': 5, 'b': 6})
  assert built == [(5, 6)]


def test_last_of_equal_paths_wins():
  new, _ = override_from_text(Root(), [('steps', '7'), ('peak', '1'), ('steps', '8')])
  assert new.steps == 8


def test_validation_errors_carry_the_path():
  with pytest.raises(ConfigError) as caught:
    override_from_text(
      Root(),
      {
        'model.feed_forward.top_k': '99',
        'model.feed_forward.groups': '5',
        'steps': 'x',
        'model.depht': '3',
      },
    )
  assert set(caught.value.messages) == {
    'model.feed_forward: top_k: 99 is more than experts = 16',
    'model.feed_forward: groups: 5 does not divide experts = 16',
    "steps: 'x' is not int",
    'model.depht: `Model` has no field `depht`; did you mean `depth`?',
  }
  lines = str(caught.value).splitlines()
  assert len(lines) == 4
  assert all(line.startswith('- ') for line in lines)


def test_validation_of_the_root_and_of_siblings():
  with pytest.raises(ConfigError) as caught:
    override(Root(), {'steps': 2})
  assert caught.value.messages == ('the model is deeper than the run is long',)
  with pytest.raises(ConfigError) as caught:
    override(
      Root(), {'model.width': 3, 'model.extra': Dense(), 'model.layers': (MLA(),), 'peak': 1}
    )
  assert caught.value.messages == ('model: width: 3 is odd',)


def test_other_errors_of_validation_are_reported_too():
  @config
  class Fragile:
    share: int = 1

    def __post_init__(self):
      if 1 % self.share < 0:
        raise ValueError('negative')

  @config
  class Top:
    part: Any = dataclasses.field(default_factory=Fragile)
    whole: Fragile = dataclasses.field(default_factory=Fragile)

  with pytest.raises(ConfigError, match=r'^whole: ValueError: negative$'):
    override(Top(), {'whole.share': -2})


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    ('modle', 'modle: `Root` has no field `modle`; did you mean `model`?'),
    ('model.zzz', 'model.zzz: `Model` has no field `zzz`; it has depth, width, attention, '),
    ('model.depth.x', 'model.depth.x: `model.depth` is int, which has no fields to set'),
    (
      'model.extra.hidden',
      'model.extra.hidden: `model.extra` is None; set it first, to one of [Dense]',
    ),
    ('model.layers.2', "model.layers.2: '2' is not an index; `model.layers` has 2 elements"),
    ('model.layers.x', "model.layers.x: 'x' is not an index; `model.layers` has 2 elements"),
    ('model.layers.-1', "model.layers.-1: '-1' is not an index; `model.layers` has 2 elements"),
    ('model..depth', "'model..depth' is not a path; write one like `model.depth`"),
    ('', "'' is not a path; write one like `model.depth`"),
    (
      'model.feed_forward.active',
      'model.feed_forward.active: `active` of `MoE` is computed from its fields and cannot be set',
    ),
  ],
)
@pytest.mark.parametrize('apply', [override, override_from_text])
def test_wrong_paths(path, message, apply):
  old = Root(model=Model(layers=(MLA(), MLA())))
  with pytest.raises(ConfigError) as caught:
    apply(old, {path: '3' if apply is override_from_text else 3})
  assert len(caught.value.messages) == 1
  assert caught.value.messages[0].startswith(message)


def test_a_part_that_was_absent_is_set_and_then_changed():
  new, changes = override_from_text(Root(), {'model.extra.hidden': '3', 'model.extra': 'Dense'})
  assert new.model.extra == Dense(hidden=3)
  assert changes == [Change(path='model.extra', old=None, new=Dense(hidden=3))]
  new, changes = override_from_text(Root(), {'model.extra': 'Dense'})
  assert changes[0].defaulted == ('hidden',)


def test_elements_of_tuples():
  old = Root(model=Model(layers=(MLA(heads=1), MLA(heads=2), MLA(heads=3)), rates=(0.1, 0.2)))
  new, changes = override_from_text(
    old, {'model.layers.1': 'Window(9)', 'model.layers.2.heads': '7', 'model.rates.0': '1'}
  )
  assert new.model.layers == (
    MLA(heads=1),
    Window(size=9, heads=2, latent=64),
    MLA(heads=7),
  )
  assert new.model.rates == (1.0, 0.2)
  assert [change.path for change in changes] == [
    'model.layers.1',
    'model.layers.2.heads',
    'model.rates.0',
  ]
  assert changes[0].carried == ('heads', 'latent')


def test_element_of_a_tuple_that_is_set_in_the_same_go():
  new, _ = override_from_text(Root(), {'model.layers.1.size': '4', 'model.layers': '(MLA, Window)'})
  assert new.model.layers == (MLA(), Window(size=4))


def test_what_was_carried_stays_with_its_own_path():
  @config
  class Two:
    left: MLA | Window = dataclasses.field(default_factory=MLA)
    left_hand: MLA | Window = dataclasses.field(default_factory=MLA)

  _, changes = override_from_text(Two(), {'left': 'Window(1)', 'left_hand': 'Window(2, 3)'})
  assert [change.carried for change in changes] == [('heads', 'latent'), ('latent',)]
