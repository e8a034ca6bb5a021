"""How often replicas meet, by made-up seconds."""

import dataclasses

import pytest

from configs import tiny_mla
from deepseek_jax.core.config import ConfigError
from deepseek_jax.optim.compression import Adaptive, Every, LocalSteps
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.train.link import Link, open_link


def test_steps_by_hand():
  """As many as make an exchange the given share of them; at least two, and no more than `most`."""
  kind = Adaptive(share=0.1, most=64)
  assert kind.steps(1.0, 2.0) == 20
  assert kind.steps(1.0, 2.01) == 21
  assert kind.steps(1.0, 0.0) == kind.steps(1.0, -0.5) == 2
  assert kind.steps(0.1, 50.0) == 64


def test_a_link_waits_for_measurements():
  """Nothing before two steps of either sort; then once after each exchange, by medians."""
  link = Link(Adaptive(share=0.5, most=100))
  link.tick(None, exchanged=False)
  for seconds in (1.0, 1.0):
    link.tick(seconds, exchanged=False)
    assert link.take() is None
  link.tick(4.0, exchanged=True)
  assert link.take() is None
  link.tick(1.0, exchanged=False)
  link.tick(6.0, exchanged=True)
  found = link.take()
  assert (found.step_seconds, found.exchange_seconds, found.steps) == (1.0, 4.0, 8)
  assert 'replicas meet every 8 steps' in str(found)
  assert link.take() is None


def test_a_link_follows_the_network():
  """When exchanges get faster, replicas meet more often again."""
  link, found = Link(Adaptive(share=0.5), window=3), []
  for seconds in (9.0, 9.0, 9.0, 2.0, 2.0, 2.0):
    for _ in range(3):
      link.tick(1.0, exchanged=False)
    link.tick(seconds, exchanged=True)
    measured = link.take()
    found.append(measured and measured.steps)
  assert found == [None, 16, 16, 16, 2, 2]


def test_only_what_adapts_is_measured():
  """Other runs have no link; nor has one replica."""
  base = tiny_mla.get_config()
  local = lambda interval, replicas: dataclasses.replace(  # noqa: E731
    base, reduction=LocalSteps(interval=interval), mesh=MeshConfig(replica=replicas)
  )
  assert open_link(base) is None
  assert open_link(local(Every(steps=3), 2)) is None
  assert open_link(local(Adaptive(), 1)) is None
  assert open_link(local(Adaptive(share=0.3), 2)).kind == Adaptive(share=0.3)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: Every(steps=0), 'Every.steps: found 0'),
    (lambda: Adaptive(share=0.0), 'Adaptive.share: found 0.0'),
    (lambda: Adaptive(start=1), 'Adaptive.start: found 1'),
    (lambda: Adaptive(start=8, most=4), 'Adaptive.most: found 4'),
    (lambda: LocalSteps(momentum=1.0), 'LocalSteps.momentum: found 1.0'),
  ],
)
def test_bad_fields(make, message):
  """Refused by name."""
  with pytest.raises(ConfigError, match=message):
    make()
