"""A decoder that sees: its encoder against NumPy, and what pictures may change."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_caption
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.tree import flatten
from deepseek_jax.layers.context import Context, Media, text_context
from deepseek_jax.layers.encoders.patch import Patch2D
from deepseek_jax.models.cost import active_parameters, forward_flops, medium_flops, weights_of
from deepseek_jax.models.decoder import init_variables
from deepseek_jax.models.encoder import Encoder, encoder_segments
from deepseek_jax.models.mtp import MTP
from deepseek_jax.models.remat import EveryLayer, SquareRoot
from deepseek_jax.models.seeing import without_media
from deepseek_jax.sharding.rules import Rules, logical_axes

MODEL = tiny_caption.get_config().model
SMALL = dataclasses.replace(MODEL.image, size=12, patch=3, depth=2, width=10)


def rms(x, scale):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def block_oracle(p, x):
  """One bidirectional layer on one picture's tokens [N, W], float64."""
  a, f = p['attention'], p['feed_forward']
  y = rms(x, p['attention_norm']['scale'])
  query, key, value = (np.einsum('nd,dhk->hnk', y, a[n]) for n in ('query', 'key', 'value'))
  scores = np.einsum('hnk,hmk->hnm', query, key) / np.sqrt(query.shape[-1])
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  x = x + np.einsum('hnm,hmk,hkd->nd', weights, value, a['output'])
  y = rms(x, p['feed_forward_norm']['scale'])
  gate = y @ f['gate']
  return x + (gate / (1 + np.exp(-gate)) * (y @ f['up'])) @ f['down']


def encoder_oracle(params, config: Patch2D, images):
  """Pictures [R, S, S, 3] to embeddings [R, S, D] in float64, patch by patch."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  side = config.size // config.patch
  result = []
  for picture in images / 127.5 - 1:
    rows = []
    for y, x in np.ndindex(side, side):
      cut = picture[y * config.patch :, x * config.patch :][: config.patch, : config.patch]
      rows.append(cut.reshape(-1) @ p['stem']['kernel'])
    x = np.array(rows) + p['stem']['position']
    for layer in range(config.depth):
      block = jax.tree.map(lambda a, i=layer: a[i], p['stack']['segment_0']['block_0'])
      x = block_oracle(block, x)
    x = rms(x, p['norm']['scale'])
    grid = x.reshape(side, side, -1)
    merged = [
      np.concatenate([grid[y, x], grid[y, x + 1], grid[y + 1, x], grid[y + 1, x + 1]])
      for y in range(0, side, 2)
      for x in range(0, side, 2)
    ]
    h = np.array(merged) @ p['projection']['up']
    h = np.asarray(jax.nn.gelu(h, approximate=False), np.float64)
    result.append(h @ p['projection']['down'])
  return np.array(result)


@pytest.mark.parametrize('remat', [None, SquareRoot()])
def test_encoder(remat):
  images = np.random.default_rng(0).integers(0, 256, (3, 12, 12, 3), np.uint8)
  module = Encoder(SMALL, 7, remat=remat)
  plain = Encoder(SMALL, 7)
  media = Media(images[:, None], np.full((3, 1), 12, np.int32))
  params = nn.meta.unbox(jax.jit(plain.init, static_argnums=2)(jax.random.key(0), media, Rules()))
  params = params['params']
  # Scales of ones would hide a norm that forgets its scale.
  params = jax.tree.map(lambda a: a * 1.3 if a.ndim == 1 else a, params)
  want = encoder_oracle(params, SMALL, images)
  assert want.shape == (3, 4, 7)
  found, real = jax.jit(lambda p: module.apply({'params': p}, media, Rules()))(params)
  assert real.all()
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope='module')
def made():
  """The tiny model with weights, and a row of one picture among tokens."""
  decoder = MODEL.build()
  variables = nn.meta.unbox(jax.jit(lambda k: init_variables(decoder, k))(jax.random.key(0)))
  rng = np.random.default_rng(1)
  tokens = rng.integers(3, 259, (2, 12)).astype(np.int32)
  places = np.full((2, 12), -1, np.int32)
  places[0, 1:5], places[1, 6:10] = range(4), range(4)
  context = dataclasses.replace(
    text_context(jnp.asarray(tokens)),
    media={
      'image': Media(
        jnp.asarray(rng.integers(0, 256, (2, 1, 64, 64, 3), np.uint8)),
        jnp.full((2, 1), 64, jnp.int32),
      )
    },
    placeholders=jnp.asarray(places),
  )
  run = jax.jit(lambda c: decoder.apply(variables, c)[0])
  return decoder, variables, context, run


def test_pictures_change_what_comes_after_them_alone(made):
  _, _, context, run = made
  shown = context.media['image']
  shown = shown.replace(values=255 - shown.values)
  other = dataclasses.replace(context, media={'image': shown})
  moved = np.abs(np.asarray(run(other)) - np.asarray(run(context))).max(axis=-1)
  assert not moved[0, :1].any()
  assert not moved[1, :6].any()
  assert (moved[0, 1:] > 1e-5).all()
  assert (moved[1, 6:] > 1e-5).all()


def test_a_picture_of_another_row_is_not_seen(made):
  _, _, context, run = made
  shown = context.media['image']
  shown = shown.replace(values=shown.values.at[1].set(0))
  other = dataclasses.replace(context, media={'image': shown})
  moved = np.abs(np.asarray(run(other)) - np.asarray(run(context))).max(axis=-1)
  assert not moved[0].any()
  assert moved[1].any()


def test_tokens_under_a_picture_do_not_matter(made):
  _, _, context, run = made
  tokens = np.where(np.asarray(context.placeholders) >= 0, 2, np.asarray(context.tokens))
  assert (tokens != np.asarray(context.tokens)).any()
  other = dataclasses.replace(context, tokens=jnp.asarray(tokens))
  np.testing.assert_array_equal(run(other), run(context))


def test_without_pictures_it_is_the_decoder_of_text(made):
  _, variables, context, run = made
  text = text_context(context.tokens)
  plain = MODEL.text.build()
  params = {k: v for k, v in variables['params'].items() if k != 'image'}
  want, _ = jax.jit(plain.apply)({'params': params, 'buffers': variables['buffers']}, text)
  np.testing.assert_allclose(run(text), want, rtol=1e-5, atol=1e-6)


def test_the_stack_knows_the_modality_but_no_pixels(made):
  _, _, context, _ = made
  inner = without_media(MODEL, context)
  assert inner.media is None
  assert inner.placeholders is None
  np.testing.assert_array_equal(inner.modality, np.asarray(context.placeholders) >= 0)
  assert without_media(MODEL, text_context(context.tokens)).modality is None


def test_rematerialisation_changes_nothing(made):
  _, variables, context, run = made
  again = MODEL.build(remat=EveryLayer())
  assert [part.repeats for part in encoder_segments(MODEL.image)] == [2]
  found = jax.jit(lambda c: again.apply(variables, c)[0])(context)
  np.testing.assert_allclose(found, run(context), rtol=1e-5, atol=1e-6)


def test_cost():
  """Counted by hand: patches meet the encoder, tokens the decoder."""
  boxed = jax.eval_shape(lambda key: init_variables(MODEL.build(), key), jax.random.key(0))
  params, axes = nn.meta.unbox(boxed)['params'], logical_axes(boxed)['params']
  weights = weights_of(MODEL, params, axes)
  assert sum(w.size for w in weights) == sum(a.size for a in flatten(params).values())
  layer = 4 * 24 * 4 * 8 + 3 * 24 * 40
  patches = 16 * (768 * 24 + 2 * layer)
  projected = 4 * (4 * 24 * 32 + 32 * 32)
  mixing = 2 * 16 * 4 * 4 * 8 * 16
  assert medium_flops(MODEL, weights, 'image') == 2 * (patches + projected) + mixing
  text = {k: v for k, v in params.items() if k != 'image'}
  plain = weights_of(MODEL.text, text, {k: v for k, v in axes.items() if k != 'image'})
  assert active_parameters(weights) == active_parameters(plain)
  base = forward_flops(MODEL.text, plain, 96)
  assert forward_flops(MODEL, weights, 96) == base
  seen = forward_flops(MODEL, weights, 96, {'image': 1}) - base
  assert seen * 96 == pytest.approx(medium_flops(MODEL, weights, 'image'))


def test_looking_ahead_is_refused():
  with pytest.raises(ConfigError, match='mtp'):
    dataclasses.replace(MODEL, text=dataclasses.replace(MODEL.text, mtp=MTP()))


def test_context_is_a_pytree_of_arrays(made):
  """Fields that are absent are no leaves."""
  _, _, context, _ = made
  assert len(jax.tree.leaves(context)) == 6
  assert isinstance(context, Context)
