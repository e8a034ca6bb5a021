"""Averaged weights in the training state, its layout, its summary and its checkpoints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.tree import flatten
from deepseek_jax.optim.ema import EMA
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import TENSOR
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.checkpoint_reader import restore_params
from deepseek_jax.train.state import fresh_state
from deepseek_jax.train.step import build_program
from deepseek_jax.train.summary import describe_memory


def build(ema):
  config = dataclasses.replace(
    tiny_mla.get_config(), ema=ema, rules=TENSOR, mesh=MeshConfig(data=2, model=4)
  )
  return build_program(config)


def test_average_lies_like_the_weights_and_its_memory_is_counted():
  program = build(EMA())
  state = program.abstract_state
  ema, params = flatten(state.ema), flatten(state.params)
  assert ema.keys() == params.keys()
  for address, leaf in params.items():
    assert (ema[address].shape, ema[address].dtype) == (leaf.shape, leaf.dtype)
    assert ema[address].sharding == leaf.sharding, address
  assert any(any(leaf.sharding.spec) for leaf in params.values())
  rows = describe_memory(program, compile_step=False).splitlines()
  figures = {row.split('  ')[0].strip(): row.split('  ')[-1].strip() for row in rows}
  assert figures['averaged weights'] == figures['parameters']
  assert build(None).abstract_state.ema == ()
  assert 'averaged' not in describe_memory(build(None), compile_step=False)


def save(path, ema):
  """A checkpoint whose weights are ones and whose average is `ema`."""
  state = fresh_state({'a': jnp.ones(3)}, {'b': jnp.zeros(2)}, (jnp.zeros(1),), ema=ema)
  with Checkpoints(path) as checkpoints:
    checkpoints.save(5, state, {'step': 5}, {'name': 'x'})


def test_which_weights_are_read(tmp_path):
  """Averaged ones where there are any, unless raw ones are asked for."""
  save(tmp_path / 'both', {'a': jnp.full(3, 2.0)})
  save(tmp_path / 'raw', ())
  read = lambda name, weights: restore_params(tmp_path / name, weights=weights)[0]['a']  # noqa: E731
  np.testing.assert_array_equal(read('both', None), np.full(3, 2.0))
  np.testing.assert_array_equal(read('both', 'averaged'), np.full(3, 2.0))
  np.testing.assert_array_equal(read('both', 'raw'), np.ones(3))
  np.testing.assert_array_equal(read('raw', None), np.ones(3))
  np.testing.assert_array_equal(read('raw', 'raw'), np.ones(3))
  with pytest.raises(ConfigError, match='without `ema`'):
    read('raw', 'averaged')
  params, buffers, _ = restore_params(tmp_path / 'both')
  assert jax.tree.structure((params, buffers)) == jax.tree.structure(({'a': 0}, {'b': 0}))
