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

from deepseek_jax.convert.architecture import model_of
from deepseek_jax.convert.lazy import stored
from deepseek_jax.convert.names import names_of
from deepseek_jax.core.tree import flatten, unflatten
from deepseek_jax.data.batch import Batch
from deepseek_jax.layers.attention.rope import RoPE
from deepseek_jax.layers.context import shift_left, text_context
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.sigmoid import SigmoidRouter
from deepseek_jax.models.decoder import canonical, grouped, plan_segments
from deepseek_jax.models.stack import TransformerBlock
from deepseek_jax.train.objective import batch_totals, training_loss

GOLDEN = pathlib.Path(__file__).parent / 'golden'
CASES = ('deepseek_v3_yarn_groups', 'deepseek_v3_plain')


def from_published(weights, model):
  """Returns our parameters and buffers, layers at their canonical addresses."""
  flat = {
    entry.ours: entry.form.ours([stored(weights[name]) for name in entry.theirs]).whole()
    for entry in names_of(model).entries
  }
  tree = unflatten(flat)
  return tree['params'], tree['buffers']


def to_published(params, model):
  """The inverse of `from_published`; linear, so gradients go through it as weights do."""
  flat = flatten({'params': params})
  return {
    name: part.whole()
    for entry in names_of(model).entries
    if entry.ours in flat
    for name, part in zip(entry.theirs, entry.form.theirs(stored(flat[entry.ours])), strict=True)
  }


@functools.cache
def load(case):
  """Reads a case: the stored arrays, our model, its parameters and buffers."""
  golden = {}
  for suffix in ('', '_mtp'):
    with np.load(GOLDEN / f'{case}{suffix}.npz') as file:
      golden |= dict(file)
  weights = {k.removeprefix('weights/'): v for k, v in golden.items() if k.startswith('weights/')}
  config = {'model_type': 'deepseek_v3', **json.loads(str(golden['config']))}
  model = model_of(config)
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
  copies = set(names_of(loaded.model).copies)
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
