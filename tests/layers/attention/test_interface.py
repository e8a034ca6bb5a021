"""What holds for every attention kind: causality, documents, padding, and the protocol."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.layers.attention.csa import CSA
from deepseek_jax.layers.attention.gated import Gated
from deepseek_jax.layers.attention.hca import HCA
from deepseek_jax.layers.attention.indexer import Indexer
from deepseek_jax.layers.attention.interface import AttentionConfig
from deepseek_jax.layers.attention.latent import MLA, Latent
from deepseek_jax.layers.attention.mha import MHA
from deepseek_jax.layers.attention.nsa import NSA
from deepseek_jax.layers.attention.recurrent import Recurrent, Slots
from deepseek_jax.layers.attention.shared_window import SharedWindow
from deepseek_jax.layers.attention.sparse import DSA, Shared, WarmUp
from deepseek_jax.layers.attention.top_k import ModalityTopK, TopK
from deepseek_jax.layers.attention.window import Window

SHARED = {
  'heads': 2,
  'head_dim': 6,
  'rope_dim': 4,
  'query_latent': 5,
  'groups': 2,
  'group_dim': 3,
  'window': 2,
}
KINDS = {
  'mla': (MLA, {}),
  'window': (Window, {'size': 2, 'sinks': 1}),
  'gated': (Gated, {'block': 2, 'window': 1}),
  'top_k': (TopK, {'top_k': 3}),
  'modality_top_k': (ModalityTopK, {'top_k': 3}),
  'dsa': (DSA, {'top_k': 3, 'indexer': Indexer(heads=3, dim=4)}),
  'dsa_shared': (
    DSA,
    {'top_k': 2, 'indexer': Indexer(heads=3, dim=4), 'sharing': Shared(block=3, window=1)},
  ),
  'dsa_warm_up': (DSA, {'indexer': Indexer(heads=3, dim=4), 'stage': WarmUp()}),
  'shared_window': (SharedWindow, SHARED),
  'hca': (HCA, SHARED | {'ratio': 2}),
  'csa': (CSA, SHARED | {'ratio': 2, 'top_k': 2, 'index_heads': 4, 'index_dim': 4}),
  'nsa': (
    NSA,
    {'heads': 4, 'kv_heads': 2, 'head_dim': 6, 'span': 2, 'stride': 1, 'block': 2, 'blocks': 2}
    | {'initial': 0, 'local': 1, 'window': 2},
  ),
  'recurrent': (Recurrent, {'size': 2, 'memory': Slots(text=2, image=1)}),
  'mha': (MHA, {'heads': 4, 'kv_heads': 2, 'head_dim': 6}),
}


@pytest.fixture(params=KINDS)
def kind(request, sizes):
  """One config of every kind."""
  config, other = KINDS[request.param]
  return config(**(sizes if issubclass(config, Latent) else {}), **other)


def test_obeys_the_protocol(kind):
  assert isinstance(kind, AttentionConfig)
  assert hash(kind) == hash(type(kind)(**vars(kind)))
  cache = jax.eval_shape(lambda: kind.empty_cache(3, 11, jnp.bfloat16))
  axes = jax.tree.leaves(kind.cache_axes(), is_leaf=lambda leaf: isinstance(leaf, tuple))
  leaves = jax.tree.leaves(cache)
  assert len(axes) == len(leaves) > 0
  for names, leaf in zip(axes, leaves):
    assert len(names) == leaf.ndim
    assert names[0] == 'batch'
    assert leaf.shape[0] == 3


def test_who_influences_whom(kind, packed, build):
  params, run = build(kind)
  x, context = packed
  segments = context.segments

  def row(x, b):
    return jnp.sum(jnp.tanh(run(params, x, context)[b]), axis=-1)

  jacobian = jax.jit(jax.jacrev(row))
  for b in range(2):
    influence = np.max(np.abs(np.asarray(jacobian(x, b))), axis=-1)  # [T, B, T]
    np.testing.assert_array_equal(influence[:, 1 - b], 0)
    for t, s in np.ndindex(9, 9):
      if segments[b, t] == 0:
        continue
      if s > t or segments[b, s] != segments[b, t]:
        assert influence[t, b, s] == 0, (t, s)
      if s == t:
        assert influence[t, b, s] > 1e-4


@pytest.mark.parametrize(
  ('place', 'unchanged'),
  [
    # The first document, the second, padding; then a token in the middle of one document.
    ((0, slice(0, 4)), [(0, slice(4, 7)), (1, slice(0, 9))]),
    ((0, slice(4, 7)), [(0, slice(0, 4)), (1, slice(0, 9))]),
    ((0, slice(7, 9)), [(0, slice(0, 7)), (1, slice(0, 9))]),
    ((1, slice(5, 6)), [(0, slice(0, 7)), (1, slice(0, 5))]),
  ],
)
def test_changed_tokens_change_nothing_they_may_not(kind, packed, build, place, unchanged):
  params, run = build(kind)
  x, context = packed
  changed = x.copy()
  changed[place] += 5.0
  before, after = np.asarray(run(params, x, context)), np.asarray(run(params, changed, context))
  for where in unchanged:
    np.testing.assert_array_equal(after[where], before[where])
  assert np.max(np.abs(after[place] - before[place])) > 1e-3
