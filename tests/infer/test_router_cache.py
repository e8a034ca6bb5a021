"""A router that knows earlier tokens knows the same ones in generation."""

import jax.numpy as jnp
import numpy as np

from deepseek_jax.infer.decode import fresh_caches, jit_decode_step, jit_full_logits, jit_prefill
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.expert_attention import ExpertAttention
from deepseek_jax.models.deepseek_v3 import DeepSeekV3

VOCAB, LENGTH = 31, 9


def test_decode_is_the_full_forward(draw_variables):
  """One dense layer, then a scan of two with the router; rows of unequal lengths."""
  decoder = DeepSeekV3(
    depth=3,
    width=16,
    vocab=VOCAB,
    attention=MLA(heads=2, nope_dim=4, rope_dim=4, value_dim=4, latent=8),
    dense=SwiGLU(hidden=12),
    feed_forward=MoE(experts=8, top_k=2, hidden=8, router=ExpertAttention(dim=6)),
  ).build(jnp.float32)
  variables = draw_variables(decoder)
  tokens = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH)).astype(np.int32)
  whole = np.full(2, LENGTH, np.int32)
  want = np.asarray(jit_full_logits(decoder, variables, tokens, whole))
  lengths = np.array([2, 5], np.int32)
  caches = fresh_caches(decoder, 2, LENGTH)
  assert caches[0][0].feed_forward is None
  assert caches[1][0].feed_forward.shape == (2, 2, 1, 7)
  logits, caches = jit_prefill(decoder, variables, caches, tokens[:, :6], 0 * lengths, lengths)
  rows = np.arange(2)
  np.testing.assert_allclose(logits, want[rows, lengths - 1], rtol=1e-4, atol=1e-4)
  for step in range(LENGTH - 5):
    at = lengths + np.int32(step)
    logits, caches = jit_decode_step(decoder, variables, caches, tokens[rows, at], at)
    np.testing.assert_allclose(logits, want[rows, at], rtol=1e-4, atol=1e-4)
  assert np.abs(np.diff(want, axis=1)).max() > 0.1
