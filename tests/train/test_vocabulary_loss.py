"""The vocabulary losses of rows that devices share are those of one device."""

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.layers.context import text_context
from deepseek_jax.ops.losses import chunked_choice, chunked_cross_entropy
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from deepseek_jax.sharding.presets import CONTEXT
from deepseek_jax.train.vocabulary_loss import choice, cross_entropy

B, T, D, VOCAB, CHUNK = 4, 24, 6, 16, 5


def test_values_and_gradients():
  """Chunks that do not divide what a device has; the vocabulary over `model`, rows over `data`."""
  rng = np.random.default_rng(0)
  hidden, head = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((B, T, D), (D, VOCAB)))
  targets = jnp.asarray(rng.integers(0, VOCAB, (B, T)), jnp.int32)
  weights = jnp.asarray(rng.uniform(0, 1, (B, T)), jnp.float32)

  def expected(hidden, head):
    return chunked_cross_entropy(hidden, head, targets, weights, CHUNK)

  @jax.jit
  def found(hidden, head):
    context = text_context(targets, CONTEXT)
    hidden = CONTEXT.constrain(hidden, ('batch', 'seq', None))
    head = CONTEXT.constrain(head, ('embed', 'vocab'))
    loss = lambda *a: cross_entropy(*a, targets, weights, CHUNK, context)  # noqa: E731
    return jax.value_and_grad(loss, (0, 1))(hidden, head), choice(
      hidden, head, targets, weights, CHUNK, context
    )

  want = jax.value_and_grad(expected, (0, 1))(hidden, head)
  total, chosen = chunked_choice(hidden, head, targets, weights, CHUNK)
  with jax.set_mesh(make_mesh(MeshConfig(data=2, seq=2, model=2))):
    (value, grads), (sum_of_nats, tokens) = found(hidden, head)
  for a, b in zip((value, *grads, sum_of_nats), (want[0], *want[1], total), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
  np.testing.assert_array_equal(tokens, chosen)
