"""Tiles on demand: those that the whole picture asks for most, and no other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.context import NEWLINE, SEPARATOR, Media
from deepseek_jax.layers.encoders.tiling import EveryTile, Progressive, Whole

BOXES = [[0, y / 2, x / 2, (y + 1) / 2, (x + 1) / 2] for y in range(2) for x in range(2)]


@pytest.fixture(scope='module')
def made():
  """A row of two pictures of 4 × 4 embeddings; the first in four tiles, the second whole."""
  rng = np.random.default_rng(0)
  tiles = Media(
    jnp.asarray(rng.integers(0, 256, (2, 5, 2, 2, 3), np.uint8)),
    jnp.full((2, 5), 2, jnp.int32).at[1, 2].set(0),
    jnp.asarray([[*BOXES, [1, 0, 0, 1, 1]]] * 2, jnp.float32),
  )
  values = jnp.asarray(rng.normal(size=(2, 32, 6)), jnp.float32)
  whole = Whole(values, jnp.ones((2, 32), bool), 4)
  module = Progressive(tiles=3).build(6)
  params = nn.meta.unbox(module.init(jax.random.key(0), tiles, whole, 3, method='choose'))['params']
  return module, params, tiles, whole


def test_the_tiles_that_are_wanted_most(made):
  """A tile's score is the mean over what it covers."""
  module, params, tiles, whole = made
  taken, chosen = module.apply({'params': params}, tiles, whole, 3, method='choose')
  need = (np.asarray(whole.values, np.float64) @ np.asarray(params['want']))[..., 0]
  grids = need.reshape(2, 2, 4, 4)
  for row in range(2):
    scores = [grids[row, 0, y : y + 2, x : x + 2].mean() for y in (0, 2) for x in (0, 2)]
    scores.append(grids[row, 1].mean())
    if row:
      scores[2] = -np.inf
    order = np.argsort(scores)[::-1][:3]
    np.testing.assert_array_equal(taken.values[row], np.asarray(tiles.values)[row, order])
    np.testing.assert_array_equal(chosen.boxes[row], np.asarray(tiles.boxes)[row, order])
    want = 2 / (1 + np.exp(-np.array(scores)[order]))
    np.testing.assert_allclose(chosen.gates[row], want, rtol=1e-5)


def test_what_is_wanted_is_learned(made):
  """Embeddings know their place and are weighed; the score has a gradient."""
  module, params, tiles, whole = made
  x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 12, 6)), jnp.float32)

  def run(params):
    _, chosen = module.apply({'params': params}, tiles, whole, 3, method='choose')
    return module.apply({'params': params}, x, chosen, method='weigh'), chosen

  found, chosen = run(params)
  for b, n in np.ndindex(2, 12):
    place = np.asarray(chosen.boxes)[b, n // 4, 1:] @ np.asarray(params['place'])
    want = (np.asarray(x)[b, n] + place) * np.asarray(chosen.gates)[b, n // 4]
    np.testing.assert_allclose(found[b, n], want, rtol=1e-4, atol=1e-5)
  gradient = jax.grad(lambda p: jnp.sum(jnp.sin(run(p)[0])))(params)
  assert np.abs(gradient['want']).max() > 1e-3
  assert np.abs(gradient['place']).max() > 1e-3


def test_every_tile_is_left_as_it_is(made):
  _, _, tiles, whole = made
  module = EveryTile().build(6)
  params = module.init(jax.random.key(0), method='marks')
  assert module.apply(params, tiles, whole, 5, method='choose') == (tiles, None)
  marks = module.apply(params, method='marks')
  assert [number for number, _ in marks] == [NEWLINE, SEPARATOR]
  assert np.abs(marks[0][1] - marks[1][1]).max() > 0.1


def test_faults(made):
  module, params, tiles, whole = made
  with pytest.raises(ConfigError, match='tiles'):
    Progressive(tiles=0)
  for given, seen in ((tiles.replace(boxes=None), whole), (tiles, None)):
    with pytest.raises(ConfigError, match='Progressive chooses'):
      module.apply({'params': params}, given, seen, 3, method='choose')
