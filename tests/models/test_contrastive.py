"""Two towers: neither sees the other, and the loss is that of all pairs of the batch."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.encoders.contrast import SigLIP
from deepseek_jax.layers.encoders.tiling import EveryTile
from deepseek_jax.models.contrastive import Contrastive
from deepseek_jax.models.decoder import init_variables
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from deepseek_jax.sharding.presets import FSDP

FEW = dict.fromkeys(('video', 'points', 'passage'))


@pytest.fixture(scope='module')
def made(sighted, shown):
  """A model of pictures and sounds, its weights, rows, and both halves of their pairs."""
  model = sighted(Contrastive, **FEW, weight=0.5)
  decoder = model.build()
  variables = nn.meta.unbox(jax.jit(lambda k: init_variables(decoder, k))(jax.random.key(0)))
  context = shown(model)
  run = jax.jit(lambda c: decoder.apply(variables, c, method='pairs'))
  return model, decoder, variables, context, run


def losses(decoder, variables, context):
  (hidden,), reported = decoder.apply(
    variables, context, method='every_depth', mutable=['losses', 'observed']
  )
  return hidden, reported


def test_neither_tower_sees_the_other(made):
  _, _, _, context, run = made
  want = run(context)
  assert want.real.tolist() == [[True] * 4, [True, False, True, False]]
  np.testing.assert_allclose(np.linalg.norm(want.media, axis=-1)[0], 1, rtol=1e-5)
  given = context.media['image']
  media = context.media | {'image': given.replace(values=255 - given.values)}
  other = run(dataclasses.replace(context, media=media))
  np.testing.assert_array_equal(other.text, want.text)
  assert np.abs(other.media - want.media)[0, :2].max() > 1e-3
  np.testing.assert_array_equal(other.media[:, 2:], want.media[:, 2:])
  words = jnp.where(context.placeholders == -1, (context.tokens - 2) % 10 + 3, context.tokens)
  other = run(dataclasses.replace(context, tokens=words))
  np.testing.assert_array_equal(other.media, want.media)
  assert (np.abs(other.text - want.text).max(axis=-1) > 1e-4)[np.asarray(want.real)].all()
  # Nor does the text see what stands at the places of media.
  words = jnp.where(context.placeholders == -1, context.tokens, 5)
  np.testing.assert_array_equal(run(dataclasses.replace(context, tokens=words)).text, want.text)


def test_the_loss_is_that_of_all_pairs(made):
  """Symmetric cross-entropy by hand, weighed, summed over the rows."""
  _, decoder, variables, context, run = made
  _, reported = jax.jit(lambda c: losses(decoder, variables, c))(context)
  towers = run(context)
  keep = np.asarray(towers.real).reshape(-1)
  media, text = (np.asarray(x, np.float64).reshape(8, -1)[keep] for x in towers[:2])
  logits = media @ text.T / 0.07
  both = [np.log(np.exp(x).sum(axis=1)) - np.diag(x) for x in (logits, logits.T)]
  want = np.sum(both) / 2
  assert float(reported['observed']['contrast']['nats']) == pytest.approx(want, rel=1e-4)
  assert float(reported['observed']['contrast']['pairs']) == 6
  assert float(reported['losses']['contrast']) == pytest.approx(want / 2, rel=1e-4)


def test_who_learns_from_what(made):
  """The next token teaches the text's layers by `text_weight` alone: 0 is not at all."""
  model, _, variables, context, _ = made

  def gradients(share):
    decoder = dataclasses.replace(model, text_weight=share).build()

    def loss(params):
      hidden, _ = losses(decoder, {**variables, 'params': params}, context)
      return jnp.mean(jnp.square(hidden - jnp.sin(jnp.arange(8.0))))

    return jax.jit(jax.value_and_grad(loss))(variables['params'])

  (none, still), (half, some) = gradients(0.0), gradients(0.5)
  assert none == pytest.approx(half)
  assert not any(np.asarray(a).any() for a in jax.tree.leaves(still))
  assert np.abs(some['embedding']['weight']).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize('loss', [None, SigLIP()])
def test_a_mesh_changes_nothing(made, sighted, loss):
  """Negatives of all devices: the loss of eight is that of one, and so are the gradients."""
  model, _, _, context, _ = made
  if loss is not None:
    model = dataclasses.replace(model, loss=loss)
  decoder = model.build()
  variables = nn.meta.unbox(jax.jit(lambda k: init_variables(decoder, k))(jax.random.key(0)))
  context = jax.tree.map(lambda x: jnp.concatenate([x] * 4), context)
  # Rows differ, so that a device that forgot the others would notice.
  words = (context.tokens + jnp.arange(8)[:, None]) % 10 + 3
  context = dataclasses.replace(context, tokens=words)

  def total(params, context):
    _, reported = losses(decoder, {**variables, 'params': params}, context)
    return reported['losses']['contrast']

  run = jax.value_and_grad(total)
  want, wanted = jax.jit(run)(variables['params'], context)
  with jax.set_mesh(make_mesh(MeshConfig(data=8))):
    spread = dataclasses.replace(context, rules=FSDP)
    found, gradients = jax.jit(run)(variables['params'], spread)
  assert float(found) == pytest.approx(float(want), rel=1e-5)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(wanted), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=2e-5 * max(np.abs(b).max(), 1e-3), err_msg=str(path))


def test_faults(sighted):
  for changes, fault in (
    ({'weight': -1.0}, 'weight'),
    ({'text_weight': -1.0}, 'text_weight'),
    ({'tiling': EveryTile()}, 'tiling'),
  ):
    with pytest.raises(ConfigError, match=fault):
      sighted(Contrastive, **changes)
