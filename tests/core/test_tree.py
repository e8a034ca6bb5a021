"""Nested dicts, flat dicts, sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.tree import bytes_of, count, flatten, unflatten


def test_flatten():
  tree = {'a': {'b': 1, 'c': {'d': ('x', None)}}, 'e': 2}
  flat = {'a/b': 1, 'a/c/d': ('x', None), 'e': 2}
  assert flatten(tree) == flat
  assert list(flatten(tree)) == list(flat)
  assert unflatten(flat) == tree


def test_empty():
  assert flatten({}) == {}
  assert unflatten({}) == {}
  assert flatten({'a': {}}) == {}


@pytest.mark.parametrize('tree', [{'a/b': 1}, {'a': {'': 1}}, {1: 2}])
def test_keys_that_cannot_stand_in_a_path(tree):
  with pytest.raises(ValueError, match='cannot stand in a path'):
    flatten(tree)


@pytest.mark.parametrize(
  'flat', [{'a': 1, 'a/b': 2}, {'a/b': 2, 'a': 1}, {'a': {}, 'a/b': 2}, {'a/b/c': 1, 'a/b': 2}]
)
def test_paths_that_collide(flat):
  with pytest.raises(ValueError, match='leaf'):
    unflatten(flat)


def test_sizes():
  tree = {
    'a': np.zeros((3, 5), np.float32),
    'b': {
      'c': jax.ShapeDtypeStruct((7,), jnp.bfloat16),
      'd': jax.ShapeDtypeStruct((), jnp.int8),
      'e': jax.ShapeDtypeStruct((2, 0), jnp.float32),
    },
    'none': None,
  }
  assert count(tree) == 15 + 7 + 1
  assert bytes_of(tree) == 60 + 14 + 1


def test_sizes_beyond_32_bits():
  tree = [jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)] * 3
  assert count(tree) == 3 * 2**40
  assert bytes_of(tree) == 12 * 2**40
