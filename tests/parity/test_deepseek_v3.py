"""Our DeepSeek-V3 against what the published implementation answers with the same weights.

`golden/make_deepseek_v3.py` says what is in the files and how they were made.
"""

import dataclasses
import functools
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.data.batch import Batch
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.rope import RoPE, YaRN
from deepseek_jax.layers.context import text_context
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.sigmoid import Sigmoid, SigmoidRouter
from deepseek_jax.models.decoder import canonical, grouped, plan_segments, shift_left
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.mtp import MTP
from deepseek_jax.models.stack import TransformerBlock
from deepseek_jax.train.objective import batch_totals, training_loss

GOLDEN = pathlib.Path(__file__).parent / 'golden'
CASES = ('deepseek_v3_yarn_groups', 'deepseek_v3_plain')
NORMS = {'attention_norm': 'input_layernorm', 'feed_forward_norm': 'post_attention_layernorm'}
MTP_NORMS = {'embedding_norm': 'enorm', 'hidden_norm': 'hnorm', 'norm': 'shared_head.norm'}


def family(c):
  """Translates a published `config.json`."""
  yarn = c['rope_scaling'] and YaRN(
    factor=c['rope_scaling']['factor'],
    original_length=c['rope_scaling']['original_max_position_embeddings'],
    beta_fast=c['rope_scaling']['beta_fast'],
    beta_slow=c['rope_scaling']['beta_slow'],
    mscale=c['rope_scaling']['mscale'],
    mscale_all=c['rope_scaling']['mscale_all_dim'],
  )
  return DeepSeekV3(
    depth=c['num_hidden_layers'],
    width=c['hidden_size'],
    vocab=c['vocab_size'],
    attention=MLA(
      heads=c['num_attention_heads'],
      nope_dim=c['qk_nope_head_dim'],
      rope_dim=c['qk_rope_head_dim'],
      value_dim=c['v_head_dim'],
      latent=c['kv_lora_rank'],
      query_latent=c['q_lora_rank'],
      rope=RoPE(theta=c['rope_theta'], yarn=yarn),
    ),
    dense=SwiGLU(hidden=c['intermediate_size']),
    dense_layers=c['first_k_dense_replace'],
    feed_forward=MoE(
      experts=c['n_routed_experts'],
      top_k=c['num_experts_per_tok'],
      hidden=c['moe_intermediate_size'],
      shared=c['n_shared_experts'],
      router=Sigmoid(
        groups=c['n_group'], kept_groups=c['topk_group'], scale=c['routed_scaling_factor']
      ),
      # The published code has no auxiliary loss.
      balance=None,
    ),
    mtp=MTP(depth=c['num_nextn_predict_layers']),
  )


def attention_params(weights, prefix, a):
  """Published linear weights are [out, in]; ours keep heads as an axis of their own."""
  get = lambda name: weights[f'{prefix}.self_attn.{name}.weight']  # noqa: E731
  head = a.nope_dim + a.rope_dim
  out = {
    'latent_down': get('kv_a_proj_with_mqa').T,
    'latent_norm': {'scale': get('kv_a_layernorm')},
    'key_value_up': get('kv_b_proj').T.reshape(a.latent, a.heads, a.nope_dim + a.value_dim),
    'output': get('o_proj').T.reshape(a.heads, a.value_dim, -1),
  }
  if a.query_latent is None:
    return {**out, 'query': get('q_proj').T.reshape(-1, a.heads, head)}
  return {
    **out,
    'query_down': get('q_a_proj').T,
    'query_norm': {'scale': get('q_a_layernorm')},
    'query_up': get('q_b_proj').T.reshape(a.query_latent, a.heads, head),
  }


def swiglu_params(weights, prefix):
  return {part: weights[f'{prefix}.{part}_proj.weight'].T for part in ('gate', 'up', 'down')}


def feed_forward_params(weights, prefix, f):
  if isinstance(f, SwiGLU):
    return swiglu_params(weights, f'{prefix}.mlp')
  each = [swiglu_params(weights, f'{prefix}.mlp.experts.{e}') for e in range(f.experts)]
  return {
    **{part: np.stack([expert[part] for expert in each]) for part in ('gate', 'up', 'down')},
    'router': {'weight': weights[f'{prefix}.mlp.gate.weight'].T},
    'shared': swiglu_params(weights, f'{prefix}.mlp.shared_experts'),
  }


def block_params(weights, index, block):
  prefix = f'model.layers.{index}'
  return {
    'attention': attention_params(weights, prefix, block.attention),
    'feed_forward': feed_forward_params(weights, prefix, block.feed_forward),
    **{ours: {'scale': weights[f'{prefix}.{theirs}.weight']} for ours, theirs in NORMS.items()},
  }


def from_published(weights, model):
  """Returns our parameters and buffers, layers at their canonical addresses."""
  layers, depth = model.layers(), model.depth
  prefix = f'model.layers.{depth}'
  params = {
    'embedding': {'weight': weights['model.embed_tokens.weight']},
    'layers': {str(i): block_params(weights, i, block) for i, block in enumerate(layers)},
    'norm': {'scale': weights['model.norm.weight']},
    'head': {'weight': weights['lm_head.weight'].T},
    'mtp_0': {
      'block': block_params(weights, depth, layers[-1]),
      'join': weights[f'{prefix}.eh_proj.weight'].T,
      **{
        ours: {'scale': weights[f'{prefix}.{theirs}.weight']} for ours, theirs in MTP_NORMS.items()
      },
    },
  }

  def bias(index):
    value = weights[f'model.layers.{index}.mlp.gate.e_score_correction_bias']
    return {'feed_forward': {'router': {'selection_bias': value}}}

  sparse = range(model.dense_layers, depth)
  buffers = {'layers': {str(i): bias(i) for i in sparse}, 'mtp_0': {'block': bias(depth)}}
  return params, buffers


def published_attention(p, a):
  out = {
    'kv_a_proj_with_mqa': p['latent_down'].T,
    'kv_a_layernorm': p['latent_norm']['scale'],
    'kv_b_proj': p['key_value_up'].reshape(a.latent, -1).T,
    'o_proj': p['output'].reshape(a.heads * a.value_dim, -1).T,
  }
  if a.query_latent is None:
    return {**out, 'q_proj': p['query'].reshape(len(p['query']), -1).T}
  return {
    **out,
    'q_a_proj': p['query_down'].T,
    'q_a_layernorm': p['query_norm']['scale'],
    'q_b_proj': p['query_up'].reshape(a.query_latent, -1).T,
  }


def published_block(p, index, block):
  prefix = f'model.layers.{index}'
  names = {
    f'self_attn.{k}': v for k, v in published_attention(p['attention'], block.attention).items()
  }
  names |= {theirs: p[ours]['scale'] for ours, theirs in NORMS.items()}
  f = p['feed_forward']
  if isinstance(block.feed_forward, SwiGLU):
    names |= {f'mlp.{part}_proj': f[part].T for part in ('gate', 'up', 'down')}
  else:
    names['mlp.gate'] = f['router']['weight'].T
    for part in ('gate', 'up', 'down'):
      names[f'mlp.shared_experts.{part}_proj'] = f['shared'][part].T
      for expert, matrix in enumerate(f[part]):
        names[f'mlp.experts.{expert}.{part}_proj'] = matrix.T
  return {f'{prefix}.{name}.weight': value for name, value in names.items()}


def to_published(params, model):
  """The inverse of `from_published`; linear, so gradients go through it as weights do."""
  layers, depth = model.layers(), model.depth
  names = {
    'model.embed_tokens.weight': params['embedding']['weight'],
    'model.norm.weight': params['norm']['scale'],
    'lm_head.weight': params['head']['weight'].T,
    f'model.layers.{depth}.eh_proj.weight': params['mtp_0']['join'].T,
  }
  for ours, theirs in MTP_NORMS.items():
    names[f'model.layers.{depth}.{theirs}.weight'] = params['mtp_0'][ours]['scale']
  for i, block in enumerate(layers):
    names |= published_block(params['layers'][str(i)], i, block)
  return names | published_block(params['mtp_0']['block'], depth, layers[-1])


@functools.cache
def load(case):
  """Reads a case: the stored arrays, our model, its parameters and buffers."""
  golden = {}
  for suffix in ('', '_mtp'):
    with np.load(GOLDEN / f'{case}{suffix}.npz') as file:
      golden |= dict(file)
  weights = {k.removeprefix('weights/'): v for k, v in golden.items() if k.startswith('weights/')}
  model = family(json.loads(str(golden['config'])))
  params, buffers = from_published(weights, model)
  return types.SimpleNamespace(
    golden=golden, weights=weights, model=model, params=params, buffers=buffers
  )


@functools.cache
def run(case):
  """Runs our model forward and backward, once, grouped into scans and jitted."""
  loaded = load(case)
  segments = plan_segments(loaded.model)
  decoder = loaded.model.build()
  tokens = jnp.asarray(loaded.golden['tokens'])
  context = text_context(tokens)
  buffers = grouped(loaded.buffers, segments)
  batch = Batch(
    tokens=tokens,
    targets=shift_left(tokens, 1),
    weights=jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0),
    positions=context.positions,
    segments=context.segments,
    documents=jnp.zeros_like(tokens),
  )

  def forward(module, context):
    hidden, ahead = module.every_depth(context)
    return hidden, module.logits(hidden, context), ahead, module.logits(ahead, context)

  def losses(params):
    variables = {'params': params, 'buffers': buffers}
    totals = batch_totals(batch, 1)
    _, (scalars, _) = training_loss(
      decoder, variables, batch, totals, jnp.float32(0.3), context, chunk=5
    )
    return jnp.stack([scalars['loss'], scalars['mtp_loss']])

  @jax.jit
  def everything(params):
    outputs = decoder.apply({'params': params, 'buffers': buffers}, context, method=forward)
    values, pull = jax.vjp(losses, params)
    return outputs, values, [pull(direction)[0] for direction in jnp.eye(2)]

  outputs, values, grads = everything(grouped(loaded.params, segments))
  grads = [to_published(canonical(g, segments), loaded.model) for g in jax.device_get(grads)]
  names = ('hidden', 'logits', 'ahead', 'ahead_logits')
  return types.SimpleNamespace(
    **dict(zip(names, outputs)), loss=values[0], mtp_loss=values[1], grads=grads
  )


def assert_near(got, want, name='', tolerance=2e-5):
  """Compares by the largest number in sight."""
  assert got.shape == want.shape, name
  scale = np.max(np.abs(want))
  assert scale > 0, name
  error = np.max(np.abs(np.asarray(got, np.float64) - want)) / scale
  assert error < tolerance, f'{name}: off by {error:.2e} of the largest value'


@pytest.mark.parametrize('case', CASES)
def test_every_weight_is_translated(case):
  loaded = load(case)
  back = to_published(loaded.params, loaded.model)
  depth = loaded.model.depth
  copies = {f'model.layers.{depth}.{n}.weight' for n in ('embed_tokens', 'shared_head.head')}
  biases = {name for name in loaded.weights if name.endswith('e_score_correction_bias')}
  assert biases
  assert set(loaded.weights) == set(back) | copies | biases
  for name, value in back.items():
    np.testing.assert_array_equal(value, loaded.weights[name], err_msg=name)


@pytest.mark.parametrize('case', CASES)
def test_rotary_frequencies_and_softmax_scale(case):
  loaded = load(case)
  attention = loaded.model.attention
  assert_near(attention.rope.frequencies(attention.rope_dim), loaded.golden['rope/frequencies'])
  assert attention.softmax_scale == pytest.approx(float(loaded.golden['rope/scale']), rel=1e-6)


def by_expert(assignment):
  """Sorts a router's answer by expert, as the golden files do."""
  order = jnp.argsort(assignment.experts, axis=1)
  take = functools.partial(jnp.take_along_axis, indices=order, axis=1)
  return take(assignment.experts), take(assignment.weights)


@pytest.mark.parametrize('case', CASES)
def test_each_layer_on_the_published_input(case):
  loaded = load(case)
  context = text_context(jnp.asarray(loaded.golden['tokens']))
  stream = loaded.params['embedding']['weight'][loaded.golden['tokens']]
  for i, block in enumerate(loaded.model.layers()):
    variables = {'params': loaded.params['layers'][str(i)]}
    if str(i) in loaded.buffers['layers']:
      variables['buffers'] = loaded.buffers['layers'][str(i)]
    (got, _), seen = jax.jit(
      lambda variables, stream, block=block: TransformerBlock(block).apply(
        variables,
        stream,
        context,
        capture_intermediates=lambda module, _: isinstance(module, SigmoidRouter),
        mutable=['intermediates'],
      )
    )(variables, stream)
    assert_near(got, loaded.golden[f'hidden/{i}'], f'layer {i}')
    if isinstance(block.feed_forward, MoE):
      (assignment,) = seen['intermediates']['feed_forward']['router']['__call__']
      experts, weights = by_expert(assignment)
      np.testing.assert_array_equal(experts, loaded.golden[f'routing/{i}/experts'])
      assert_near(weights, loaded.golden[f'routing/{i}/weights'], f'routing {i}')
    # The published output, not ours: an error is then reported by the layer that makes it.
    stream = loaded.golden[f'hidden/{i}']


@pytest.mark.parametrize('case', CASES)
def test_hidden_states_logits_and_loss(case):
  golden, ours = load(case).golden, run(case)
  assert_near(ours.hidden, golden['final_hidden'], 'hidden')
  assert_near(ours.logits, golden['logits'], 'logits')
  assert float(ours.loss) == pytest.approx(float(golden['loss']), rel=2e-6)


@pytest.mark.parametrize('case', CASES)
def test_multi_token_prediction(case):
  golden, ours = load(case).golden, run(case)
  # The last position has no token to look ahead to.
  assert_near(ours.ahead[:, :-1], golden['mtp/hidden'], 'hidden')
  assert_near(ours.ahead_logits[:, :-1], golden['mtp/logits'], 'logits')
  assert float(ours.mtp_loss) == pytest.approx(float(golden['mtp/loss']), rel=2e-6)


@pytest.mark.parametrize('prefix', ['gradients/', 'mtp/gradients/'])
@pytest.mark.parametrize('case', CASES)
def test_gradients(case, prefix):
  golden, ours = load(case).golden, run(case)
  names = [name for name in golden if name.startswith(prefix)]
  assert len(names) >= 9
  for name in names:
    grads = ours.grads[prefix.startswith('mtp/')]
    assert_near(grads[name.removeprefix(prefix)], golden[name], name)


def test_a_wrong_model_is_noticed():
  loaded = load('deepseek_v3_yarn_groups')
  wrong = dataclasses.replace(
    loaded.model,
    attention=dataclasses.replace(loaded.model.attention, rope=RoPE(theta=100.0)),
  )
  block = wrong.layers()[0]
  context = text_context(jnp.asarray(loaded.golden['tokens']))
  stream = loaded.params['embedding']['weight'][loaded.golden['tokens']]
  got, _ = jax.jit(TransformerBlock(block).apply)(
    {'params': loaded.params['layers']['0']}, stream, context
  )
  with pytest.raises(AssertionError, match='off by'):
    assert_near(got, loaded.golden['hidden/0'])
