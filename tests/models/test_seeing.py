"""Five kinds of media before one decoder: each by itself, in any order, on one device or eight."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.context import IMAGE, MEDIA, TEXT, Media
from deepseek_jax.layers.encoders.projection import SeparateProjection
from deepseek_jax.layers.encoders.tiling import EveryTile, Progressive
from deepseek_jax.models.cost import medium_flops, weights_of
from deepseek_jax.models.decoder import init_variables
from deepseek_jax.models.encoder import Encoder
from deepseek_jax.models.seeing import encode_media, media_spans, span_starts, without_media
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from deepseek_jax.sharding.presets import FSDP
from deepseek_jax.sharding.rules import Rules, logical_axes

NO_OTHERS = dict.fromkeys(('video', 'sound', 'points', 'passage'))


def variables_of(model):
  decoder = model.build()
  return decoder, nn.meta.unbox(jax.jit(lambda k: init_variables(decoder, k))(jax.random.key(0)))


@pytest.fixture(scope='module')
def made(sighted, shown):
  """A model of all kinds, a context, and what encodes it."""
  model = sighted()
  decoder, variables = variables_of(model)
  context = shown(model)

  def encode(context, params=variables['params']):
    apply = {'params': params, 'buffers': variables['buffers']}
    found = decoder.apply(apply, context, method=lambda m, c: encode_media(m, c)[:2])
    return found

  return model, decoder, variables, context, jax.jit(encode)


def test_every_medium_is_encoded_by_itself(made):
  """All media of all rows at once are those of one row, one medium, one encoder."""
  model, _, variables, context, encode = made
  values, real = encode(context)
  spans, start = media_spans(model, context.media), 0
  assert [span.kind for span in spans] == [kind for kind in MEDIA if kind != 'tile']
  assert values.shape == (2, sum(span.media * span.slots for span in spans), 8)
  shared = {k: np.asarray(v, np.float64) for k, v in variables['params']['shared'].items()}
  for span in spans:
    config = model.encoders[span.kind]
    encoder = Encoder(config, 8, ending=model.projection)
    params = {'params': variables['params'][span.kind]}
    run = jax.jit(lambda m, e=encoder, p=params: e.apply(p, m, Rules()))
    for row, medium in ((1, 0), (0, 1)):
      given = context.media[span.kind]
      one = Media(
        given.values[row : row + 1, medium : medium + 1],
        given.counts[row : row + 1, medium : medium + 1],
      )
      x, shown = run(one)
      at = slice(start + medium * span.slots, start + (medium + 1) * span.slots)
      want = np.asarray(x[0], np.float64) @ shared['space'] @ shared['out']
      np.testing.assert_array_equal(real[row, at], shown[0])
      keep = np.asarray(shown[0])
      assert keep.any()
      np.testing.assert_allclose(
        values[row, at][keep], want[keep], rtol=1e-4, atol=1e-5, err_msg=span.kind
      )
    at = slice(start + span.slots, start + 2 * span.slots)
    assert not real[1, at].any(), 'there is no second medium in the second row'
    start += span.media * span.slots


def test_what_is_not_real_does_not_matter(made):
  """Entries beyond the end of a medium, whatever they are, change no embedding that is real."""
  _, _, _, context, encode = made
  media = {}
  for kind, given in context.media.items():
    size = given.values.shape[2]
    beyond = np.arange(size) >= np.asarray(given.counts)[..., None]
    beyond = beyond.reshape(*beyond.shape, *[1] * (given.values.ndim - 3))
    # Of a picture all lines are real, or none.
    beyond &= kind != 'image'
    media[kind] = given.replace(values=jnp.where(beyond, 3, given.values))
  values, real = encode(context)
  other, again = encode(dataclasses.replace(context, media=media))
  np.testing.assert_array_equal(real, again)
  keep = np.asarray(real)
  np.testing.assert_allclose(np.asarray(other)[keep], np.asarray(values)[keep], atol=1e-6)


def test_kinds_that_a_batch_has_none_of(made):
  """The others come one after the other all the same."""
  model, decoder, variables, context, _ = made
  few = {kind: context.media[kind] for kind in ('sound', 'image')}
  assert [span.kind for span in media_spans(model, few)] == ['image', 'sound']
  with pytest.raises(ConfigError, match='soundd'):
    media_spans(model, {'soundd': few['sound']})
  end = span_starts(media_spans(model, few))[-1]
  places = jnp.where(context.placeholders < end, context.placeholders, -1)
  run = jax.jit(lambda c: decoder.apply(variables, c)[0])
  found = run(dataclasses.replace(context, media=few, placeholders=places))
  assert np.isfinite(found).all()


def test_modality_of_every_token(made):
  model, _, _, context, _ = made
  inner = without_media(model, context)
  spans = media_spans(model, context.media)
  kinds = [span.kind for span in spans for _ in range(span.media * span.slots)]
  for b, t in np.ndindex(context.placeholders.shape):
    place = int(context.placeholders[b, t])
    assert inner.modality[b, t] == (MEDIA[kinds[place]] if place >= 0 else TEXT)
  marks = dataclasses.replace(context, placeholders=jnp.full_like(context.placeholders, -2))
  assert (without_media(model, marks).modality == IMAGE).all()


def test_a_mesh_changes_nothing(made):
  """Eight devices, rows and weights spread: hidden states and the gradients of every weight."""
  _, decoder, variables, context, _ = made
  context = jax.tree.map(lambda x: jnp.concatenate([x] * 4), context)
  factor = jnp.sin(jnp.arange(8.0))

  def loss(params, context):
    hidden, _ = decoder.apply({'params': params, 'buffers': variables['buffers']}, context)
    return jnp.mean(jnp.square(hidden - factor))

  run = jax.value_and_grad(loss)
  want, wanted = jax.jit(run)(variables['params'], context)
  with jax.set_mesh(make_mesh(MeshConfig(data=8))):
    spread = dataclasses.replace(context, rules=FSDP)
    found, gradients = jax.jit(run)(variables['params'], spread)
  assert float(found) == pytest.approx(float(want), rel=1e-5)
  pairs = zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(wanted), strict=True)
  for (path, a), b in pairs:
    # The loss knows no head.
    assert np.abs(b).max() > 0 or path[0].key == 'head', path
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), err_msg=str(path))


@pytest.mark.parametrize(
  'tiling', [EveryTile(), pytest.param(Progressive(tiles=1), marks=pytest.mark.slow)]
)
def test_tiles(sighted, shown, tiling):
  """All tiles or one of two a row; every weight of the model takes part."""
  model = sighted(**NO_OTHERS, tiling=tiling)
  decoder, variables = variables_of(model)
  context = shown(model)
  count = 2 if isinstance(tiling, EveryTile) else 1
  assert [(s.kind, s.media) for s in media_spans(model, context.media)] == [
    ('image', 2),
    ('tile', count),
  ]
  marked = jnp.where(context.placeholders == 1, -2, context.placeholders)
  marked = jnp.where(context.placeholders == 2, -3, marked)
  context = dataclasses.replace(context, placeholders=marked)

  def loss(params):
    hidden, _ = decoder.apply({'params': params, 'buffers': variables['buffers']}, context)
    return jnp.mean(jnp.square(hidden - jnp.sin(jnp.arange(8.0))))

  for path, gradient in jax.tree_util.tree_leaves_with_path(
    jax.jit(jax.grad(loss))(variables['params'])
  ):
    assert np.isfinite(gradient).all(), path
    assert np.abs(gradient).max() > 0 or path[0].key == 'head', path


def test_shared_and_separate_projections(sighted):
  """Shared: one way for all; separate: one for each."""
  shared, separate = (
    jax.eval_shape(lambda k, m=m: init_variables(m.build(), k), jax.random.key(0))['params']
    for m in (sighted(), sighted(projection=SeparateProjection()))
  )
  assert set(shared['shared']) == {'space', 'out'}
  assert 'shared' not in separate
  for kind in ('image', 'video', 'sound', 'points', 'passage'):
    assert set(shared[kind]['projection']) == {'up'}
    assert set(separate[kind]['projection']) == {'up', 'down'}


def test_cost(sighted):
  """Points, counted by hand: neighbours meet the small network, centres all else."""
  model = sighted()
  boxed = jax.eval_shape(lambda k: init_variables(model.build(), k), jax.random.key(0))
  params, axes = nn.meta.unbox(boxed)['params'], logical_axes(boxed)['params']
  weights = weights_of(model, params, axes)
  layer = 4 * 8 * 2 * 6 + 3 * 8 * 12
  local = 3 * 4 * (3 * 5 + 5 * 8)
  projected = 3 * (8 * 10 + 10 * 10 + 10 * 8)
  mixing = 3 * 4 * 2 * 6 * 3
  want = 2 * (local + 3 * (3 * 8 + layer) + projected) + mixing
  assert medium_flops(model, weights, 'points') == want
  assert medium_flops(model, weights, 'tile') == 0


def test_wrong_configs(sighted):
  with pytest.raises(ConfigError, match='no encoder'):
    sighted(**NO_OTHERS, image=None)
  with pytest.raises(ConfigError, match='tiling'):
    sighted(image=None, tiling=EveryTile())


def test_data_and_encoders_must_agree(sighted):
  model = sighted()
  fine = {kind: (*e.medium, e.slots) for kind, e in model.encoders.items()}
  assert model.check_media(fine) == []
  wrong = {
    'image': ((9, 8, 3), 'uint8', 4),
    'points': ((9, 3), 'float32', 2),
    'tile': ((8, 8, 3), 'uint8', 4),
  }
  messages = model.check_media(wrong)
  assert len(messages) == 3
  for message, word in zip(messages, ('model.image reads', 'takes 2 slots', '`tile`')):
    assert word in message
