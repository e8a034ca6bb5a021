"""Tiny models of every attention kind, as the inference tests need them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from deepseek_jax.layers.attention.csa import CSA
from deepseek_jax.layers.attention.gated import Gated, Share
from deepseek_jax.layers.attention.hca import HCA
from deepseek_jax.layers.attention.indexer import Indexer
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.mha import MHA
from deepseek_jax.layers.attention.nsa import NSA
from deepseek_jax.layers.attention.recurrent import Recurrent, Slots
from deepseek_jax.layers.attention.rope import RoPE, YaRN
from deepseek_jax.layers.attention.shared_window import SharedWindow
from deepseek_jax.layers.attention.sparse import DSA, Shared
from deepseek_jax.layers.attention.top_k import ModalityTopK, TopK
from deepseek_jax.layers.attention.window import Window
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.sigmoid import Sigmoid
from deepseek_jax.models.decoder import init_variables
from deepseek_jax.models.deepseek_v3 import DeepSeekV3

VOCAB = 61
SIZES = {'heads': 2, 'nope_dim': 8, 'rope_dim': 4, 'value_dim': 8, 'latent': 16}
SHARED = {
  'heads': 2,
  'head_dim': 8,
  'rope_dim': 4,
  'query_latent': 12,
  'groups': 1,
  'group_dim': 8,
  'rope': RoPE(),
}
YARN = YaRN(factor=4.0, original_length=8, mscale=1.0, mscale_all=0.5)
KINDS = {
  'mla': MLA(**SIZES),
  'mla_query_latent': MLA(**SIZES, query_latent=12),
  'mla_yarn': MLA(**SIZES, rope=RoPE(yarn=YARN)),
  'window': Window(**SIZES, size=5, sinks=2),
  'top_k': TopK(**SIZES, top_k=3),
  'modality_top_k': ModalityTopK(**SIZES, top_k=3),
  'dsa': DSA(**SIZES, top_k=3, indexer=Indexer(heads=16, dim=8)),
  'dsa_shared': DSA(
    **SIZES, top_k=2, indexer=Indexer(heads=16, dim=8), sharing=Shared(block=4, window=1)
  ),
  'gated': Gated(**SIZES, keep=Share(share=0.3), block=4, window=1),
  'mha': MHA(heads=4, kv_heads=2, head_dim=8),
  'recurrent': Recurrent(**SIZES, size=4, memory=Slots(text=3)),
  'shared_window': SharedWindow(**SHARED, window=3),
  'hca': HCA(**SHARED, window=3, ratio=4),
  'csa': CSA(**SHARED, window=3, ratio=2, top_k=2, index_heads=16, index_dim=8),
  'nsa': NSA(
    heads=4, kv_heads=2, head_dim=8, span=4, stride=2, block=4, blocks=3, local=1, window=3
  ),
}


def random_variables(decoder):
  """Weights of the usual sizes, without compiling a random generator; buffers are zeros."""
  boxed = jax.eval_shape(lambda key: init_variables(decoder, key), jax.random.key(0))
  shapes, noise = nn.meta.unbox(boxed), np.random.default_rng(5)

  def draw(path, shape):
    if path[-1].key.endswith('scale'):
      return jnp.ones(shape.shape, shape.dtype)
    if path[-1].key in ('key_bias', 'fading'):
      return jnp.asarray(noise.normal(0, 0.1, shape.shape), shape.dtype)
    # What has one axis and is no scale is an offset.
    fan_in = 1 if 'embedding' in str(path) else (100, *shape.shape)[-2]
    return jnp.asarray(noise.normal(0, fan_in**-0.5, shape.shape), shape.dtype)

  return {
    'params': jax.tree_util.tree_map_with_path(draw, shapes['params']),
    'buffers': jax.tree.map(lambda shape: jnp.zeros(shape.shape), shapes['buffers']),
  }


@pytest.fixture(scope='session')
def draw_variables():
  """The function above, for decoders that a test builds itself."""
  return random_variables


@pytest.fixture(scope='session')
def make_model():
  """Builds (decoder, variables): one dense layer, then a mixture of more experts than tokens."""

  @functools.cache
  def make(
    kind='mla', *, depth=2, vocab=VOCAB, dtype='float32', remat=None, mtp=None, router=Sigmoid()
  ):
    family = DeepSeekV3(
      depth=depth,
      width=32,
      vocab=vocab,
      attention=KINDS[kind],
      dense=SwiGLU(hidden=48),
      feed_forward=MoE(experts=12, top_k=2, hidden=16, router=router),
      mtp=mtp,
    )
    decoder = family.build(np.dtype(dtype), remat)
    variables = random_variables(decoder)

    def rule_out(path, bias):
      # The last experts never get a token, in whatever batch.
      assert path[-1].key == 'selection_bias'
      return bias.at[..., -4:].set(-9.0)

    variables['buffers'] = jax.tree_util.tree_map_with_path(rule_out, variables['buffers'])
    assert jax.tree.leaves(variables['buffers'])
    return decoder, variables

  return make


@pytest.fixture(scope='session')
def model(make_model):
  """One model of latent attention, for tests that are not about attention."""
  return make_model()
