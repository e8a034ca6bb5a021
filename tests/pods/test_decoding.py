"""The plan of a decoding step."""

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.pods.decoding import build_decoding, read_decoding
from deepseek_jax.pods.topology import compile_program
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import TENSOR

ROWS, SLOTS = 4, 24


@pytest.fixture(scope='module')
def decoding(shrink):
  """A step of four rows on 2 × 4 devices."""
  experiment = shrink(mesh=MeshConfig(data=2, model=4), rules=TENSOR)
  return build_decoding(experiment, jax.devices(), ROWS, SLOTS)


def test_weights_are_kept_as_they_are_multiplied_with(decoding):
  """In the compute dtype, cut as the rules say; rows of the cache along the batch's axes."""
  variables, caches, tokens, _ = decoding.arguments
  down = variables['params']['stack']['segment_0']['block_0']['feed_forward']['down']
  assert down.dtype == jnp.dtype(decoding.experiment.precision.compute)
  assert down.sharding.shard_shape(down.shape) == (4, 1024 // 4, 256 // 2)
  leaf = jax.tree.leaves(caches)[0]
  assert leaf.sharding.shard_shape(leaf.shape)[1] == ROWS // 2
  assert tokens.shape == (ROWS,)


def test_the_plan_of_a_step(decoding, small_slice):
  """Its cache has a class of its own, and it does what one token a row needs."""
  build = compile_program(lambda: decoding.step.lower(*decoding.arguments))
  plan = read_decoding(decoding, small_slice, build, SLOTS)
  assert (plan.kind, plan.tokens) == ('decode', ROWS)
  layers, latent = 4, 64 + 8
  held = layers * ROWS / 2 * SLOTS * latent * 4
  assert held <= plan.memory.by_class['cache'] < 1.3 * held + 1000
  assert plan.memory.by_class['gradients'] == plan.memory.by_class['optimizer'] == 0
  assert plan.model_flops < plan.flops < 4 * plan.model_flops


def test_rows_that_do_not_divide_are_refused(shrink):
  """By their flag."""
  experiment = shrink(mesh=MeshConfig(data=8))
  with pytest.raises(ConfigError, match='--decode_rows is 12, not divisible by the 8 devices'):
    build_decoding(experiment, jax.devices(), 12, SLOTS)
