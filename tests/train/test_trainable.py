"""Freezing: which weights move in a step, layer by layer, and patterns that fit nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_dsa, tiny_mla
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.tree import flatten
from deepseek_jax.data.batch import Batch
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.sparse import WarmUp
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.models.decoder import plan_segments
from deepseek_jax.models.plan import Block, Segment
from deepseek_jax.train.report import attention_figures
from deepseek_jax.train.step import build_program
from deepseek_jax.train.trainable import check_patterns, trainable_part

BLOCK = Block(attention=MLA(heads=1), feed_forward=SwiGLU(hidden=2))
SEGMENTS = (Segment((BLOCK,), 1), Segment((BLOCK,), 3))
PARAMS = {
  'embedding': {'table': jnp.ones((5, 2))},
  'stack': {
    'segment_0': {'block_0': {'attention': {'query': jnp.ones((2, 2))}}},
    'segment_1': {
      'block_0': {'attention': {'query': jnp.ones((3, 2, 2)), 'key': jnp.ones((3, 2))}}
    },
  },
}


def kept(*patterns):
  keep = trainable_part(patterns or None, PARAMS, SEGMENTS)
  # In the compiled step shapes are all there is.
  tree = jax.jit(keep)(PARAMS)
  stack = tree['stack']
  return (
    float(tree['embedding']['table'].mean()),
    float(stack['segment_0']['block_0']['attention']['query'].mean()),
    np.asarray(stack['segment_1']['block_0']['attention']['query'].mean(axis=(1, 2))).tolist(),
    np.asarray(stack['segment_1']['block_0']['attention']['key'].mean(axis=1)).tolist(),
  )


def test_patterns_fit_canonical_addresses():
  assert kept() == (1, 1, [1, 1, 1], [1, 1, 1])
  assert kept('*/attention/key') == (0, 0, [0, 0, 0], [1, 1, 1])
  assert kept('layers/[02]/*') == (0, 1, [0, 1, 0], [0, 1, 0])
  assert kept('embedding/*', 'layers/3/attention/query') == (1, 0, [0, 0, 1], [0, 0, 0])


def test_a_pattern_that_fits_nothing_is_named():
  assert check_patterns(None, PARAMS, SEGMENTS) == []
  assert check_patterns(('layers/*',), PARAMS, SEGMENTS) == []
  (message,) = check_patterns(('layers/*', 'layers/0/attention/qery'), PARAMS, SEGMENTS)
  assert "'layers/0/attention/qery'" in message
  assert 'did you mean `layers/0/attention/query`?' in message


def test_an_empty_list_is_refused():
  with pytest.raises(ConfigError, match='nothing would be trained'):
    dataclasses.replace(tiny_mla.get_config(), trainable=())


def test_only_the_indexer_moves():
  """In the warm-up of DSA, where weight decay would move all else too."""
  base = tiny_dsa.get_config()
  attention = dataclasses.replace(base.model.attention, stage=WarmUp())
  model = dataclasses.replace(
    base.model, depth=2, mtp=None, attention=attention, feed_forward=SwiGLU(hidden=8)
  )
  data = dataclasses.replace(base.data, length=16, batch_size=2)
  experiment = dataclasses.replace(
    base, model=model, data=data, trainable=('*/attention/indexer/*',), balance=None
  )
  with pytest.raises(ConfigError, match='indxer'):
    build_program(dataclasses.replace(experiment, trainable=('*/indxer/*',)), jax.devices()[:1])
  program = build_program(experiment, jax.devices()[:1])
  rng = np.random.default_rng(0)
  draw = lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32)  # noqa: E731
  state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), program.abstract_state)
  state = state.replace(params=jax.tree.map(draw, state.params))
  before = state.params
  state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, program.abstract_state))
  step = program.step.compile(program.abstract_state, program.abstract_batch())
  ids = rng.integers(0, 259, (2, 16)).astype(np.int32)
  places = np.tile(np.arange(16, dtype=np.int32), (2, 1))
  ones = np.ones_like(ids)
  batch = Batch(ids, ids, ones.astype(np.float32), places, ones, ones)
  state, metrics = jax.device_get(step(state, jax.device_put(batch, program.batch_sharding)))
  moved = flatten(jax.tree.map(lambda a, b: np.max(np.abs(a - b)), before, state.params))
  for address, distance in moved.items():
    assert (distance > 0) == ('/indexer/' in address), address
  figures = attention_figures(metrics['observed'], plan_segments(experiment.model, None))
  assert figures.keys() == {f'index_{n}' for n in ('recall', 'coverage', 'divergence', 'near')}
  assert all(len(values) == 2 for values in figures.values())
  assert all(0 < value <= 1 for value in figures['index_recall'] + figures['index_coverage'])
