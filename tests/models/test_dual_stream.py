"""Two streams: words see media before them, media see words before them, and nothing leaks back."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.infer.decode import fresh_caches
from deepseek_jax.layers.attention.bidirectional import Bidirectional
from deepseek_jax.layers.attention.cross import OrderedCross
from deepseek_jax.layers.attention.fusion import Fusion
from deepseek_jax.layers.attention.rope import Axial
from deepseek_jax.layers.context import text_context
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.models.decoder import init_variables
from deepseek_jax.models.dual_stream import DualStream, MediaStream
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from deepseek_jax.sharding.presets import FSDP

CROSS = {'heads': 2, 'head_dim': 4, 'slots': 64}
STREAM = MediaStream(
  attention=Bidirectional(heads=2, head_dim=4),
  cross=OrderedCross(**CROSS),
  feed_forward=SwiGLU(hidden=8),
)
KINDS = {
  'dual': {'cross': OrderedCross(**CROSS), 'media': STREAM},
  'fusion': {'cross': Fusion(**CROSS, weight_dim=4)},
}


@pytest.fixture(scope='module', params=[pytest.param('dual', marks=pytest.mark.slow), 'fusion'])
def made(request, sighted, shown):
  """A model of pictures and sounds, its weights, a context with one place a medium, and a run."""
  model = sighted(
    DualStream, video=None, points=None, passage=None, every=1, **KINDS[request.param]
  )
  decoder = model.build()
  variables = nn.meta.unbox(jax.jit(lambda k: init_variables(decoder, k))(jax.random.key(0)))
  # Weights away from their start: what is written to the stream is no longer small.
  variables['params'] = jax.tree.map(lambda a: 2 * a, variables['params'])
  run = jax.jit(lambda p, c: decoder.apply({**variables, 'params': p}, c)[0])
  return model, decoder, variables, shown(model, slots=1), run


def test_words_see_what_is_shown_before_them(made):
  """Row 0: word, picture, word, picture, word, sound, …; a picture changes what comes after."""
  _, _, variables, context, run = made
  want = run(variables['params'], context)
  for kind, medium in (('image', 1), ('sound', 0)):
    given = context.media[kind]
    values = given.values.at[0, medium].set(7 if kind == 'image' else 0.5)
    media = context.media | {kind: given.replace(values=values)}
    got = run(variables['params'], dataclasses.replace(context, media=media))
    moved = np.abs(np.asarray(got - want)).max(axis=-1)
    assert not moved[1].any()
    first = {'image': 3, 'sound': 5}[kind]
    assert not moved[0, :first].any()
    # A document ends at the word after the last medium that it shows.
    same = np.asarray(context.segments)[0] == context.segments[0, first]
    assert (moved[0, first:][same[first:]] > 0).all()
    assert not moved[0, first:][~same[first:]].any()


def test_later_words_change_nothing_earlier(made):
  _, _, variables, context, run = made
  want = run(variables['params'], context)
  for place in (2, 4):
    tokens = context.tokens.at[:, place].set((context.tokens[:, place] - 2) % 10 + 3)
    got = run(variables['params'], dataclasses.replace(context, tokens=tokens))
    moved = np.abs(np.asarray(got - want)).max(axis=-1)
    assert not moved[:, :place].any()
    assert (moved[:, place] > 1e-6).all()


def test_media_see_the_question(made):
  """A word before a picture changes what a later word reads in it: by the media's own stream."""
  model, decoder, variables, context, _ = made
  if model.media is None:
    return

  def memory(context):
    return decoder.apply(
      variables, context, method=lambda m, c: m.memory(m.embed(c.tokens, c), c).values
    )

  run = jax.jit(memory)
  want = run(context)
  tokens = context.tokens.at[0, 2].set((context.tokens[0, 2] - 2) % 10 + 3)
  moved = np.abs(np.asarray(run(dataclasses.replace(context, tokens=tokens)) - want)).max(axis=-1)
  assert not moved[1].any()
  # The second picture comes after the word, the first before it.
  assert not moved[0, :4].any()
  assert (moved[0, 4:8] > 1e-6).all()


def test_every_weight_takes_part_and_a_mesh_changes_nothing(made):
  """Gradients are not zero but where nothing can be asked; eight devices make the same ones."""
  _, decoder, variables, context, _ = made
  context = jax.tree.map(lambda x: jnp.concatenate([x] * 4), context)

  def loss(params, context):
    hidden, _ = decoder.apply({**variables, 'params': params}, context)
    return jnp.mean(jnp.square(hidden - jnp.sin(jnp.arange(8.0))))

  run = jax.value_and_grad(loss)
  # Weights as they start: with sharper attention, roundings grow from layer to layer.
  params = jax.tree.map(lambda a: a / 2, variables['params'])
  want, wanted = jax.jit(run)(params, context)
  with jax.set_mesh(make_mesh(MeshConfig(data=8))):
    spread = dataclasses.replace(context, rules=FSDP)
    found, gradients = jax.jit(run)(params, spread)
  assert float(found) == pytest.approx(float(want), rel=1e-5)
  largest = max(np.abs(b).max() for b in jax.tree.leaves(wanted))
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(wanted), strict=True
  ):
    # The loss knows no head. What is far smaller than the rest is a sum of terms that cancel.
    assert np.abs(b).max() > 0 or path[0].key == 'head', path
    limit = 5e-5 * max(np.abs(b).max(), 1e-3 * largest)
    np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=str(path))


def test_a_cache_remembers_media_and_words(made):
  """The first document of each row, read to its last medium, then word by word."""
  _, decoder, variables, context, run = made
  length = int((np.asarray(context.segments)[0] == 1).sum())
  cut = lambda x: x[:, :length]  # noqa: E731
  context = dataclasses.replace(
    context,
    tokens=cut(context.tokens),
    positions=cut(context.positions),
    segments=cut(context.segments),
    placeholders=cut(context.placeholders),
  )
  whole = run(variables['params'], context)
  apply = jax.jit(lambda c, caches: decoder.apply(variables, c, caches))
  caches = fresh_caches(decoder, 2, length)
  start = length - 3
  begin = {name: getattr(context, name)[:, :start] for name in ('tokens', 'positions', 'segments')}
  # Placeholders in the rest show nothing new: what they stand for lies in the future.
  places = context.placeholders[:, :start]
  first, caches = apply(dataclasses.replace(context, **begin, placeholders=places), caches)
  known = np.asarray(places).max()
  later = np.asarray(context.placeholders)[0, start:]
  np.testing.assert_allclose(first, whole[:, :start], rtol=1e-4, atol=1e-5)
  for step in range(start, length):
    if (later[: step - start + 1] > known).any():
      break
    one = text_context(context.tokens[:, step : step + 1])
    one = dataclasses.replace(one, positions=context.positions[:, step : step + 1])
    got, caches = apply(one, caches)
    np.testing.assert_allclose(got[:, 0], whole[:, step], rtol=1e-4, atol=1e-5)


def test_text_alone(made):
  """Without media a row is text; every layer that would attend to media reads nothing."""
  _, _, variables, context, run = made
  text = text_context(context.tokens)
  found = run(variables['params'], text)
  assert np.isfinite(found).all()


def test_faults(sighted):
  with pytest.raises(ConfigError, match='every'):
    sighted(DualStream, cross=OrderedCross(**CROSS), every=0)
  with pytest.raises(ConfigError, match='rope'):
    dataclasses.replace(STREAM, attention=Bidirectional(heads=2, rope=Axial()))
  with pytest.raises(ConfigError, match='depth'):
    dataclasses.replace(STREAM, depth=0)
