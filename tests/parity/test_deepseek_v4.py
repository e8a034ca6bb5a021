"""Our attention kinds and hyper-connections give the numbers of the published DeepSeek-V4 code.

The numbers come from tests/parity/golden/make_deepseek_v4.py, whose docstring says what is stored.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.layers.attention.csa import CSA
from deepseek_jax.layers.attention.hca import HCA
from deepseek_jax.layers.attention.rope import RoPE, YaRN
from deepseek_jax.layers.attention.shared_window import SharedWindow
from deepseek_jax.layers.context import text_context
from deepseek_jax.layers.hyper_connections import HyperConnections

GOLDEN = pathlib.Path(__file__).with_name('golden') / 'deepseek_v4_parts.npz'
TOLERANCE = 2e-5
"""Largest error, in units of the largest number: both compute in float32."""


@functools.cache
def golden():
  with np.load(GOLDEN) as file:
    return dict(file)


def part(prefix):
  cut = len(prefix) + 1
  return {name[cut:]: value for name, value in golden().items() if name.startswith(f'{prefix}/')}


def kind_of(name):
  c = json.loads(str(golden()['config']))
  yarn = c['rope_parameters']
  sizes = {
    'heads': c['num_attention_heads'],
    'head_dim': c['head_dim'],
    'rope_dim': round(c['head_dim'] * c['partial_rotary_factor']),
    'query_latent': c['q_lora_rank'],
    'groups': c['o_groups'],
    'group_dim': c['o_lora_rank'],
    'window': c['sliding_window'],
  }
  if name == 'window':
    return SharedWindow(**sizes, rope=RoPE(theta=c['rope_theta']))
  sizes['rope'] = RoPE(
    theta=c['compress_rope_theta'],
    yarn=YaRN(
      factor=yarn['factor'],
      original_length=yarn['original_max_position_embeddings'],
      beta_fast=yarn['beta_fast'],
      beta_slow=yarn['beta_slow'],
    ),
  )
  rates = c['compress_rates']
  if name == 'hca':
    return HCA(**sizes, ratio=rates['heavily_compressed_attention'])
  return CSA(
    **sizes,
    ratio=rates['compressed_sparse_attention'],
    top_k=c['index_topk'],
    index_heads=c['index_n_heads'],
    index_dim=c['index_head_dim'],
  )


def compressor(published, prefix):
  return {
    'value': published[f'{prefix}.kv_proj.weight'].T,
    'gate': published[f'{prefix}.gate_proj.weight'].T,
    'position_bias': published[f'{prefix}.position_bias'],
    'norm': {'scale': published[f'{prefix}.kv_norm.weight']},
  }


def to_ours(kind, published):
  """Our tree of a layer's weights, or of their gradients: the translation is linear."""
  p = published
  down = p['o_a_proj.weight'].reshape(kind.groups, kind.group_dim, -1)
  ours = {
    'query_down': p['q_a_proj.weight'].T,
    'query_norm': {'scale': p['q_a_norm.weight']},
    'query_up': p['q_b_proj.weight'].T.reshape(-1, kind.heads, kind.head_dim),
    'key': p['kv_proj.weight'].T,
    'key_norm': {'scale': p['kv_norm.weight']},
    'sinks': p['sinks'],
    # A group's matrix is [out, heads · channels].
    'output_down': down.transpose(0, 2, 1).reshape(kind.heads, kind.head_dim, kind.group_dim),
    'output_up': p['o_b_proj.weight'].T,
  }
  if 'compressor.kv_proj.weight' in p:
    ours['compressor'] = compressor(p, 'compressor')
  if 'compressor.indexer.kv_proj.weight' in p:
    name = 'compressor.indexer'
    ours['index_compressor'] = compressor(p, name)
    query = p[f'{name}.q_b_proj.weight'].T
    ours['index_query'] = query.reshape(-1, kind.index_heads, kind.index_dim)
    ours['index_weights'] = p[f'{name}.scorer.weights_proj.weight'].T
  return ours


def assert_near(got, want, name=''):
  assert got.shape == want.shape, name
  scale = np.max(np.abs(want))
  assert scale > 0, name
  error = np.max(np.abs(np.asarray(got, np.float64) - want)) / scale
  assert error < TOLERANCE, f'{name}: off by {error:.2e} of the largest value'


def only(tree, like):
  return {k: only(v, like[k]) if isinstance(v, dict) else v for k, v in tree.items() if k in like}


@pytest.mark.parametrize('name', ['window', 'csa', 'hca'])
def test_attention(name):
  kind = kind_of(name)
  params = to_ours(kind, part(f'{name}/weights'))
  x, pull = golden()['x'], golden()['pull']
  context = text_context(jnp.ones(x.shape[:2], jnp.int32))
  module = kind.build()

  def loss(params, x):
    (output, _), seen = module.apply(
      {'params': params},
      x,
      context,
      capture_intermediates=lambda _, method: method == 'choose',
      mutable=['intermediates'],
    )
    return jnp.sum(output * pull), (output, seen)

  step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(params, x).compile()
  (grads, grad_x), (output, seen) = step(params, x)
  if name == 'csa':
    ((indices, *_),) = seen['intermediates']['choose']
    assert_chosen(np.asarray(indices), part(name)['chosen'], kind.top_k)
  assert_near(output, part(name)['output'], 'output')
  want = part(f'{name}/gradients')
  assert_near(grad_x, want.pop('x'), 'gradient of x')
  want = to_ours(kind, want)
  learnt = only(grads, want)
  assert jax.tree.structure(learnt) == jax.tree.structure(want)
  for (path, b), a in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(learnt)):
    assert_near(a, b, jax.tree_util.keystr(path))
  # The choice teaches the indexer nothing, as published.
  for key in set(grads) - set(want):
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads[key])), key


def assert_chosen(indices, want, top_k):
  """The indexer chose what the published one chose."""
  got = np.zeros((*want.shape[:2], want.shape[2] + 2), bool)
  for b, t in np.ndindex(want.shape[:2]):
    got[b, t, indices[b, t]] = True
  # An index of -1 marks the last place, which is no entry.
  np.testing.assert_array_equal(got[..., : want.shape[2]], want)
  assert want.sum(-1).max() == top_k < want.shape[2]


def test_hyper_connections():
  c = json.loads(str(golden()['config']))
  residual = HyperConnections(lanes=c['hc_mult']).build()
  site, head = part('site/weights'), part('head/weights')
  params = {
    'mixer': {'matrix': site['fn'].T, 'base': site['base'], 'gates': site['scale']},
    'head': {'matrix': head['hc_fn'].T, 'base': head['hc_base'], 'gates': head['hc_scale']},
  }
  pull = golden()['pull']

  def through(module, stream):
    x, mix = module.read(stream)
    return module.write(stream, 2 * x, mix), module.close(stream)

  def loss(stream):
    output, closed = residual.apply({'params': params}, stream, method=through)
    return jnp.sum(output * pull[:, :, None]), (output, closed)

  stream = golden()['stream']
  step = jax.jit(jax.grad(loss, has_aux=True)).lower(stream).compile()
  grad, (output, closed) = step(stream)
  assert_near(output, part('site')['output'], 'site')
  assert_near(grad, part('site/gradients')['stream'], 'gradient')
  assert_near(closed, part('head')['output'], 'head')
