"""The facts that travel with the tokens."""

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.layers.context import Context, text_context
from deepseek_jax.sharding.rules import Rules


def test_text_context():
  context = text_context(jnp.array([[5, 6, 7], [8, 9, 10]], jnp.int32))
  np.testing.assert_array_equal(context.positions, [[0, 1, 2], [0, 1, 2]])
  np.testing.assert_array_equal(context.real, np.ones((2, 3), bool))
  assert context.rules == Rules()


def test_padding_is_not_real():
  ids = jnp.zeros((1, 3), jnp.int32)
  context = Context(tokens=ids, positions=ids, segments=jnp.array([[1, 2, 0]]))
  np.testing.assert_array_equal(context.real, [[True, True, False]])


def test_rules_are_static():
  context = text_context(jnp.zeros((1, 2), jnp.int32))
  # Absent facts and the rules are no leaves: a jitted function sees arrays alone.
  assert len(jax.tree.leaves(context)) == 3
