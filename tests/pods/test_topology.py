"""Slices by name, and what stands for their devices."""

import importlib.util

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.pods import topology
from deepseek_jax.sharding.mesh import arrange


@pytest.mark.parametrize(
  ('text', 'chips', 'devices'),
  [('v5p:8x8x8', 512, 512), ('v6e:8x8', 64, 64), ('tpu7x:4x4x8', 128, 256), ('v5p:2x2', 4, 4)],
)
def test_a_slice_is_read(text, chips, devices):
  """Its chips, and the devices that JAX has of them."""
  found = topology.parse_topology(text)
  assert (found.chips, found.devices) == (chips, devices)
  assert topology.parse_topology(found.name) == found
  assert len(topology.places(found)) == devices


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('v5p', 'expected one slice like v5p:8x8x8'),
    ('v5p:8x8x8*2', 'expected one slice'),
    ('v5q:8x8x8', 'did you mean `v5p`'),
    ('v6e:4x4x4', 'lie along 2 axes'),
    ('v5p:0x1x1', 'lie along 3 axes'),
  ],
)
def test_what_is_no_slice_is_refused(text, message):
  """Form, generation, axes."""
  with pytest.raises(ConfigError, match=message):
    topology.parse_topology(text)


def test_stand_ins_are_laid_out_as_devices_are():
  """Neighbours of the torus lie along the last axes of a mesh, also where those cut its axes."""
  places = topology.places(topology.parse_topology('v5p:8x8x8'))
  grid = arrange(places, (1, 1, 32, 1, 16, 1))
  group = [place.coords for place in grid[0, 0, 0, 0, :, 0]]
  spans = [len(set(axis)) for axis in zip(*group, strict=True)]
  assert sorted(spans) == [1, 2, 8]
  assert len({place.id for place in grid.reshape(-1)}) == 512


def test_a_missing_compiler_is_named(monkeypatch):
  """With the command that installs it."""
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match=r'pip install "deepseek_jax\[pods\]"'):
    topology.prepare({})


def test_what_keeps_the_compiler_from_looking_for_a_device(monkeypatch):
  """The variables it reads."""
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
  environ: dict[str, str] = {}
  topology.prepare(environ)
  assert environ['TPU_SKIP_MDS_QUERY'] == '1'
  assert environ['JAX_PLATFORMS'] == 'cpu'
