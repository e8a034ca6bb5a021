"""Weighed attention to modalities: one alone is cross-attention, and a cache remembers enough."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.cross import OrderedCross
from deepseek_jax.layers.attention.fusion import Fusion
from deepseek_jax.layers.attention.interface import AttentionConfig
from deepseek_jax.layers.context import IMAGE, SOUND, Memory, text_context

CONFIG = Fusion(heads=2, head_dim=5, slots=6, weight_dim=4)
KINDS = np.array([[IMAGE, IMAGE, SOUND, SOUND, IMAGE]] * 2, np.int32)


def memory(modality=KINDS):
  """Five vectors a row; the last one of the first row is not there, and two come later."""
  values = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
  segments = np.array([[1, 1, 1, 1, 0], [1] * 5], np.int32)
  positions = np.array([[0, 0, 2, 2, 0], [0, 0, 0, 3, 3]], np.int32)
  return Memory(*(jnp.asarray(x) for x in (values, positions, segments, modality)))


def rows(length=6):
  return jnp.asarray(np.random.default_rng(1).normal(size=(2, length, 7)), jnp.float32)


@pytest.fixture(scope='module')
def ready():
  """Parameters, and the module run on rows, memory and cache."""
  module = CONFIG.build()
  context = dataclasses.replace(text_context(jnp.ones((2, 6), jnp.int32)), memory=memory())
  params = nn.meta.unbox(module.init(jax.random.key(0), rows(), context)['params'])

  def run(x, context, cache=None):
    return module.apply({'params': params}, x, context, cache, mutable=['observed'])

  return params, jax.jit(run), context


def test_one_modality_alone_is_cross_attention(ready):
  params, run, context = ready
  alone = memory(np.full((2, 5), SOUND, np.int32))
  (got, _), seen = run(rows(), dataclasses.replace(context, memory=alone))
  plain = OrderedCross(heads=2, head_dim=5, slots=6).build()
  shared = {name: params[name] for name in ('query', 'key', 'value', 'output')}
  context = dataclasses.replace(context, memory=alone)
  want, _ = plain.apply({'params': shared}, rows(), context)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  weights = seen['observed']['fusion']
  assert weights['tokens'] == 12
  np.testing.assert_allclose(weights['weights'], [0, 0, 0, 12, 0], atol=1e-4)


def test_what_is_missing_changes_nothing(ready):
  """A modality that no token sees is as if it were not in the memory."""
  _, run, context = ready
  gone = memory()
  gone = gone.replace(segments=jnp.where(gone.modality == SOUND, 0, gone.segments))
  (got, _), _ = run(rows(), dataclasses.replace(context, memory=gone))
  other = gone.replace(values=jnp.where(gone.modality[..., None] == SOUND, 9.0, gone.values))
  (want, _), _ = run(rows(), dataclasses.replace(context, memory=other))
  np.testing.assert_array_equal(got, want)
  (both, _), _ = run(rows(), context)
  assert np.abs(both - got).max() > 1e-3


def test_later_words_do_not_matter(ready):
  """Nor what is shown later."""
  _, run, context = ready
  (want, _), _ = run(rows(), context)
  changed = rows().at[:, 3:].add(1.0)
  (got, _), _ = run(changed, context)
  np.testing.assert_allclose(got[:, :3], want[:, :3], rtol=1e-5, atol=1e-6)
  assert np.abs(got[:, 3:] - want[:, 3:]).max() > 1e-3
  late = memory()
  late = late.replace(values=jnp.where(late.positions[..., None] >= 2, 9.0, late.values))
  (got, _), _ = run(rows(), dataclasses.replace(context, memory=late))
  np.testing.assert_allclose(got[0, :2], want[0, :2], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(got[1, :3], want[1, :3], rtol=1e-5, atol=1e-6)
  assert np.abs(got[0, 2:] - want[0, 2:]).max() > 1e-3


def test_a_cache_remembers_memory_and_question(ready):
  """The memory is given with the first tokens; rows of unequal length go on one by one."""
  _, run, context = ready
  (whole, _), _ = run(rows(), context)
  cache = CONFIG.empty_cache(2, 99, jnp.float32)
  # The second row begins with two tokens and padding.
  first = jax.tree.map(lambda a: a[:, :3] if a.shape[1] == 6 else a, context)
  first = dataclasses.replace(first, segments=first.segments.at[1, 2].set(0))
  (begin, cache), _ = run(rows()[:, :3], first, cache)
  np.testing.assert_allclose(begin[0], whole[0, :3], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(begin[1, :2], whole[1, :2], rtol=1e-5, atol=1e-6)
  starts = np.array([3, 2])
  for step in range(3):
    at = starts + step
    x = jnp.take_along_axis(rows(), at[:, None, None], axis=1)
    one = dataclasses.replace(
      text_context(jnp.ones((2, 1), jnp.int32)), positions=jnp.asarray(at[:, None], jnp.int32)
    )
    (got, cache), _ = run(x, one, cache)
    want = np.stack([whole[row, place] for row, place in enumerate(at)])
    np.testing.assert_allclose(got[:, 0], want, rtol=1e-5, atol=1e-6)


def test_faults(ready):
  params, _, context = ready
  module = CONFIG.build()
  with pytest.raises(ConfigError, match='None'):
    module.apply({'params': params}, rows(), dataclasses.replace(context, memory=None))
  untold = dataclasses.replace(context, memory=memory().replace(modality=None))
  with pytest.raises(ConfigError, match='modality'):
    module.apply({'params': params}, rows(), untold)
  small = dataclasses.replace(CONFIG, slots=4).empty_cache(2, 9, jnp.float32)
  with pytest.raises(ConfigError, match='5 vectors'):
    module.apply({'params': params}, rows(), context, small)
  with pytest.raises(ConfigError, match='take tokens back'):
    CONFIG.empty_cache(1, 9, jnp.float32, 1)
  with pytest.raises(ConfigError, match='weight_dim'):
    Fusion(heads=2, weight_dim=0)
  assert isinstance(CONFIG, AttentionConfig)
