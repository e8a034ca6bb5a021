"""The facts that travel with the tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.layers.context import Context, Memory, text_context
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


def test_rows_reaches_every_array_of_rows_and_no_other():
  """Tokens, facts and memory, but not the step; what is absent stays absent."""
  plain = text_context(jnp.arange(6).reshape(2, 3))
  memory = Memory(jnp.ones((2, 4, 5)), jnp.ones((2, 4), jnp.int32), jnp.ones((2, 4), jnp.int32))
  context = dataclasses.replace(plain, memory=memory, step=jnp.int32(7))
  found = context.rows(lambda x: x[:1])
  assert found.tokens.tolist() == [[0, 1, 2]]
  others = (found.positions, found.segments, *jax.tree.leaves(found.memory))
  assert {x.shape[0] for x in others} == {1}
  assert found.step == 7
  assert found.modality is None
