"""Tokens of point clouds: a centre and what lies around it, whatever the order of the points."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.bidirectional import Bidirectional
from deepseek_jax.layers.encoders.points import Points
from deepseek_jax.layers.feed_forward import SwiGLU

CONFIG = Points(
  width=6,
  depth=1,
  attention=Bidirectional(heads=2, head_dim=4),
  feed_forward=SwiGLU(hidden=8),
  points=13,
  features=2,
  groups=4,
  neighbours=5,
  hidden=7,
)
COUNTS = np.array([13, 3], np.int32)


def clouds(seed=0):
  """Two clouds, of 13 and of 3 points."""
  return np.random.default_rng(seed).normal(size=(2, 13, 5)).astype(np.float32)


def ran(config, points, counts=COUNTS):
  module = config.stem(np.float32)
  params = nn.meta.unbox(module.init(jax.random.key(0), points, counts))['params']
  return params, jax.jit(lambda p, x: module.apply({'params': p}, x, counts))


def gelu(x):
  return np.asarray(jax.nn.gelu(jnp.asarray(x, jnp.float32), approximate=False), np.float64)


@pytest.mark.parametrize('radius', [None, 1.2])
def test_tokens(radius):
  """Against a loop over centres and their neighbours."""
  config, points = dataclasses.replace(CONFIG, radius=radius), clouds()
  params, run = ran(config, points)
  tokens = run(params, points)
  p = {name: np.asarray(a, np.float64) for name, a in params.items()}
  assert tokens.real.tolist() == [[True] * 4, [True] * 3 + [False]]
  for row, count in enumerate(COUNTS):
    own = points[row, :count].astype(np.float64)
    for g in range(min(4, count)):
      centre = np.asarray(tokens.coordinates[row, g], np.float64)
      gaps = np.linalg.norm(own[:, :3] - centre, axis=1)
      assert gaps.min() == 0
      order = [i for i in gaps.argsort()[:5] if radius is None or gaps[i] <= radius]
      seen = own[order].copy()
      seen[:, :3] -= centre
      found = (gelu(seen @ p['first']) @ p['second']).max(axis=0) + centre @ p['place']
      np.testing.assert_allclose(tokens.values[row, g], found, rtol=1e-4, atol=1e-4)


def test_the_order_of_the_points_does_not_count():
  points, order = clouds(1), np.random.default_rng(2).permutation(13)
  counts = np.array([13, 13], np.int32)
  params, run = ran(CONFIG, points, counts)
  found, want = run(params, points[:, order]), run(params, points)
  np.testing.assert_allclose(found.values, want.values, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(found.coordinates, want.coordinates)


def test_what_is_not_real_does_not_matter():
  """Not even what is not a number; and the gradient is finite."""
  points = clouds()
  other = points.copy()
  other[1, 3:] = np.nan
  params, run = ran(CONFIG, points)
  found, want = run(params, other), run(params, points)
  np.testing.assert_array_equal(found.values[want.real], want.values[want.real])
  gradient = jax.grad(lambda p: jnp.sum(run(p, other).values ** 2))(params)
  assert all(np.isfinite(a).all() and np.abs(a).any() for a in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
  'changes', [{'groups': 14}, {'neighbours': 0}, {'radius': 0.0}, {'features': -1}]
)
def test_wrong_sizes(changes):
  with pytest.raises(ConfigError, match=next(iter(changes))):
    dataclasses.replace(CONFIG, **changes)
