"""A budget of keys for each modality, against float64 and against `TopK`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.top_k import ModalityTopK, Shown, TopK
from deepseek_jax.layers.context import IMAGE, SOUND, TEXT, Context

LENGTH = 37


@pytest.fixture(scope='module')
def row():
  """Activations [1, 37, 7]: text, 12 embeddings of a picture, text, 9 of a sound, and text."""
  x = np.random.default_rng(3).standard_normal((1, LENGTH, 7)).astype(np.float32)
  kinds = [TEXT] * 4 + [IMAGE] * 12 + [TEXT] * 6 + [SOUND] * 9 + [TEXT] * 6
  ones, places = np.ones((1, LENGTH), np.int32), np.arange(LENGTH, dtype=np.int32)[None]
  modality = np.array([kinds], np.int32)
  return x, Context(tokens=ones, positions=places, segments=ones, modality=modality)


def choices(config, params, x):
  """Returns [T, S] the scores by which keys are chosen: those of a single wide head, in float64."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  both = x[0].astype(np.float64) @ p['latent_down']
  latent = both[:, : config.latent]
  latent = latent / np.sqrt(np.mean(latent**2, -1, keepdims=True) + 1e-6)
  latent *= p['latent_norm']['scale']
  query = np.einsum('td,dhk->thk', x[0].astype(np.float64), p['query'])
  key = np.einsum('sc,chk->shk', latent, p['key_value_up'])[..., : config.nope_dim]
  frequencies = config.rope.frequencies(config.rope_dim).astype(np.float64)

  def turned(y):
    angles = np.exp(1j * np.arange(LENGTH)[:, None] * frequencies)
    z = (y[..., 0::2] + 1j * y[..., 1::2]) * angles
    return np.stack([z.real, z.imag], -1).reshape(y.shape)

  rope = turned(query[..., config.nope_dim :].sum(1)) @ turned(both[:, config.latent :]).T
  return np.einsum('thk,shk->ts', query[..., : config.nope_dim], key) + rope


@pytest.mark.parametrize('shown', [Shown(image=2, sound=1), Shown(image=0, sound=40)])
def test_each_modality_has_its_best(sizes, build, oracle, row, shown):
  config = ModalityTopK(**sizes, top_k=3, shown=shown)
  params, run = build(config)
  x, context = row
  scores, kinds = choices(config, params, x), context.modality[0]
  counts = {TEXT: 3, IMAGE: shown.image, SOUND: shown.sound}

  def allowed(b, t, s):
    own = [i for i in range(t + 1) if kinds[i] == kinds[s]]
    best = sorted(own, key=lambda i: -scores[t, i])[: counts[kinds[s]]]
    return s in best

  want = oracle(params, config, x, context.positions, allowed)
  np.testing.assert_allclose(run(params, x, context), want, atol=2e-5)


def test_text_alone_is_top_k(sizes, build, packed):
  """Where nobody says what tokens are, and where all are said to be text."""
  x, context = packed
  params, run = build(ModalityTopK(**sizes, top_k=3))
  want = build(TopK(**sizes, top_k=3))[1](params, x, context)
  np.testing.assert_array_equal(run(params, x, context), want)
  text = dataclasses.replace(context, modality=jnp.zeros_like(context.positions))
  # Choices that find nothing add zeros to the sums, so these are in another order.
  np.testing.assert_allclose(run(params, x, text), want, atol=1e-6)


def test_gradients(sizes, build, row):
  """With room for all, what is learnt is what the dense form learns."""
  x, context = row
  grad = np.random.default_rng(0).standard_normal((1, LENGTH, 7)).astype(np.float32)

  def slopes(config):
    params, run = build(config)
    return jax.grad(lambda p, x: jnp.vdot(run(p, x, context), grad), (0, 1))(params, x)

  wide = Shown(image=50, video=0, sound=50, points=0)
  found = slopes(ModalityTopK(**sizes, top_k=50, shown=wide))
  want = slopes(TopK(**sizes, top_k=50))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize('first', [1, 20, 30])
def test_a_cache_knows_what_was_shown(sizes, build, row, first):
  """What is remembered of `first` tokens, then the others one by one: as the whole row."""
  config = ModalityTopK(**sizes, top_k=3, shown=Shown(image=2, sound=1))
  params, run = build(config)
  x, context = row
  module, cache = config.build(), config.empty_cache(1, LENGTH, jnp.float32)
  step = jax.jit(lambda x, context, cache: module.apply({'params': params}, x, context, cache))
  want, at = run(params, x, context), 0
  for size in [first] + [1] * (LENGTH - first):
    rows = slice(at, at + size)
    part = jax.tree.map(lambda a, rows=rows: a[:, rows], context)
    y, cache = step(x[:, rows], part, cache)
    np.testing.assert_allclose(y, want[:, rows], atol=1e-5)
    at += size


def test_faults():
  with pytest.raises(ConfigError, match='`sound` is -1; expected 0 or more keys'):
    Shown(sound=-1)
