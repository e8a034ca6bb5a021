"""Our DeepSeek-VL against what the published implementation answers with the same weights.

`golden/make_deepseek_vl.py` says what is in the file and how it was made.
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

from deepseek_jax.convert.lazy import stored
from deepseek_jax.convert.names import names_of
from deepseek_jax.convert.vision import vision_model_of
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.tree import flatten, unflatten
from deepseek_jax.data.batch import Batch
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.context import Media, shift_left, text_context
from deepseek_jax.models.decoder import canonical, grouped, plan_segments
from deepseek_jax.models.seeing import encode_media
from deepseek_jax.train.objective import batch_context, batch_totals, training_loss

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'deepseek_vl.npz'


@functools.cache
def load():
  """The stored arrays, our model, and its parameters with layers at their canonical addresses."""
  with np.load(GOLDEN) as file:
    golden = dict(file)
  config = json.loads(str(golden['config']))
  model = vision_model_of(config)
  flat = {
    entry.ours: entry.form.ours([stored(golden[f'weights/{n}']) for n in entry.theirs]).whole()
    for entry in names_of(model).entries
  }
  return types.SimpleNamespace(
    golden=golden, config=config, model=model, params=unflatten(flat)['params']
  )


def to_published(params, model):
  """Our parameters, or gradients like them, under their published names."""
  flat = flatten({'params': params})
  return {
    name: part.whole()
    for entry in names_of(model).entries
    for name, part in zip(entry.theirs, entry.form.theirs(stored(flat[entry.ours])), strict=True)
  }


@functools.cache
def run():
  """Runs our model forward and backward, once."""
  loaded = load()
  golden, model = loaded.golden, loaded.model
  decoder, segments = model.build(), plan_segments(model)
  tokens = jnp.asarray(golden['tokens'])
  shown = golden['tokens'] == loaded.config['image_token_id']
  places = np.where(shown, np.cumsum(shown, axis=1) - 1, -1)
  text = text_context(tokens)
  batch = Batch(
    tokens=tokens,
    targets=shift_left(tokens, 1),
    weights=jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0),
    positions=text.positions,
    segments=text.segments,
    documents=jnp.zeros_like(tokens),
    media={'image': Media(jnp.asarray(golden['pictures'])[:, None], jnp.full((2, 1), 14))},
    placeholders=jnp.asarray(places, jnp.int32),
  )
  context = batch_context(batch, text.rules)

  def forward(module, context):
    return encode_media(module, context).values, module.logits(module(context)[0], context)

  def loss(params):
    totals = batch_totals(batch, 0)
    variables = {'params': params}
    total, _ = training_loss(decoder, variables, batch, totals, jnp.float32(0), context, chunk=5)
    return total

  @jax.jit
  def everything(params):
    return decoder.apply({'params': params}, context, method=forward), jax.value_and_grad(loss)(
      params
    )

  (aligned, logits), (value, gradients) = everything(grouped(loaded.params, segments))
  gradients = to_published(canonical(jax.device_get(gradients), segments), model)
  return types.SimpleNamespace(aligned=aligned, logits=logits, loss=value, gradients=gradients)


def test_every_weight_is_translated_and_back():
  loaded = load()
  back = to_published(loaded.params, loaded.model)
  theirs = {k.removeprefix('weights/') for k in loaded.golden if k.startswith('weights/')}
  assert set(back) == theirs
  for name, value in back.items():
    np.testing.assert_array_equal(value, loaded.golden[f'weights/{name}'], err_msg=name)


def test_pictures_and_logits():
  """Within 1e-4, as float32 allows."""
  golden, found = load().golden, run()
  np.testing.assert_allclose(found.aligned, golden['aligned'], atol=1e-4)
  np.testing.assert_allclose(found.logits, golden['logits'], atol=1e-4)
  assert np.abs(golden['logits']).max() > 1
  assert float(found.loss) == pytest.approx(float(golden['loss']), rel=1e-5)


def test_gradients():
  """Of every weight, within 1e-4 of the largest; an offset of keys has none, softmax takes it."""
  golden, found = load().golden, run().gradients
  for name, value in found.items():
    want = golden[f'gradients/{name}']
    scale = np.abs(want).max()
    if name.endswith('k_proj.bias'):
      assert max(scale, np.abs(value).max()) < 1e-6
      continue
    assert scale > 1e-3, name
    assert np.abs(value - want).max() <= 1e-4 * scale, name


@pytest.mark.parametrize(
  ('part', 'changes', 'fault'),
  [
    ('text_config', {'hidden_act': 'gelu'}, 'text_config.hidden_act'),
    ('text_config', {'rope_parameters': {'rope_type': 'yarn'}}, 'rope_parameters'),
    ('vision_config', {'hidden_act': 'relu'}, 'vision_config.hidden_act'),
  ],
)
def test_what_no_model_here_does(part, changes, fault):
  config = load().config
  with pytest.raises(ConfigError, match=fault):
    vision_model_of(config | {part: config[part] | changes})


def test_other_models_have_no_names():
  model = load().model
  latent = MLA(heads=2, nope_dim=4, rope_dim=2, value_dim=3, latent=5)
  text = dataclasses.replace(model.text, attention=latent)
  with pytest.raises(ConfigError, match='DeepSeek-VL alone'):
    names_of(dataclasses.replace(model, text=text))
