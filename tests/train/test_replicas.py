"""What replicas carry: over checkpoints, other numbers of replicas and other groups of layers."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.serialise import to_json
from deepseek_jax.core.tree import flatten
from deepseek_jax.layers.moe.growth import Growth
from deepseek_jax.models.remat import SquareRoot
from deepseek_jax.optim.compression import LocalSteps, Quantised
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.initialise import resume_state
from deepseek_jax.train.replicas import refit_carry
from deepseek_jax.train.step import build_program

INT4 = Quantised(bits=4)


def program(replicas: int, reduction=INT4, remat=None):
  """The functions of a run of four scanned layers; nothing is compiled."""
  base = tiny_mla.get_config()
  base = dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, depth=4, dense_layers=0, mtp=None),
    mesh=MeshConfig(replica=replicas),
    reduction=reduction,
    remat=remat,
  )
  return build_program(base, jax.devices())


def drawn(made, seed: int = 0):
  """A made-up state, on its devices."""
  generator = np.random.default_rng(seed)

  def draw(leaf):
    if leaf.dtype == np.float32:
      return generator.standard_normal(leaf.shape).astype(np.float32)
    return np.full(leaf.shape, 3, leaf.dtype)

  state = jax.tree.map(draw, made.abstract_state)
  return jax.device_put(state, jax.tree.map(lambda x: x.sharding, made.abstract_state))


def save(path, made, state) -> Checkpoints:
  """Saves it as step 3."""
  with Checkpoints(path) as checkpoints:
    checkpoints.save(3, state, {'step': 3}, to_json(made.experiment), {})
  return Checkpoints(path)


def collect(lines: list[str]):
  """Takes lines."""
  return lines.append


def test_the_same_replicas_go_on_bitwise(tmp_path):
  """Errors and all; nothing is told."""
  made, lines = program(2), []
  state = drawn(made)
  before = jax.device_get(state)
  found = resume_state(made, save(tmp_path, made, state), 3, collect(lines))
  assert jax.tree.structure(found) == jax.tree.structure(before)
  for again, leaf in zip(jax.tree.leaves(found), jax.tree.leaves(before), strict=True):
    np.testing.assert_array_equal(again, leaf)
  assert not lines


@pytest.mark.parametrize(('before', 'after'), [(2, 4), (4, 1)])
def test_other_replicas_share_the_errors(tmp_path, before, after):
  """What is to be added to the sum is what it was; weights are those that were saved."""
  old, new, lines = program(before), program(after), []
  state = drawn(old)
  saved = jax.device_get(state)
  found = resume_state(new, save(tmp_path, old, state), 3, collect(lines))
  assert f'saved by {before} replicas: {after} go on' in lines[0]
  for address, leaf in flatten(found.carry['error']).items():
    wanted = flatten(saved.carry['error'])[address]
    assert leaf.shape == (after, *wanted.shape[1:])
    assert leaf.sharding == flatten(new.abstract_state.carry['error'])[address].sharding
    np.testing.assert_allclose(np.sum(leaf, axis=0), wanted.sum(axis=0), rtol=1e-5, atol=1e-5)
  for address, leaf in flatten(found.params).items():
    np.testing.assert_array_equal(leaf, flatten(saved.params)[address])


def test_layers_in_other_groups_keep_their_errors(tmp_path):
  """Four layers in one scan; then two scans' worth in each of its steps."""
  old, new = program(2), program(2, remat=SquareRoot())
  state = drawn(old)
  saved = flatten(jax.device_get(state).carry['error'])
  found = flatten(resume_state(new, save(tmp_path, old, state), 3).carry['error'])
  assert set(found) != set(saved)
  for rest in ('attention/output', 'feed_forward/gate'):
    one = saved[f'stack/segment_0/block_0/{rest}']
    for layer in range(4):
      other = found[f'stack/segment_0/block_{layer % 2}/{rest}']
      np.testing.assert_array_equal(other[:, layer // 2], one[:, layer])


def test_the_rule_by_hand():
  """Errors are shared, what was moved is averaged, counts stay."""
  carry = {
    'error': {'w': np.float32([[1, 2], [3, 6]])},
    'moved': {'w': np.float32([[1, 2], [3, 6]])},
    'memory': {'count': np.int32([7, 7])},
    'since': np.int32(2),
  }
  found = refit_carry(jax.tree.map(jax.numpy.asarray, carry), 4)
  np.testing.assert_array_equal(found['error']['w'], [[1, 2]] * 4)
  np.testing.assert_array_equal(found['moved']['w'], [[2, 4]] * 4)
  np.testing.assert_array_equal(found['memory']['count'], [7] * 4)
  assert int(found['since']) == 2


def test_local_steps_lie_along_replicas():
  """Weights in common are whole on every replica; what each has of its own is not."""
  state = program(2, LocalSteps(exchange=INT4)).abstract_state
  assert set(state.carry) == {'moved', 'memory', 'interval', 'since', 'error'}
  params, spec = flatten(state.params), jax.sharding.PartitionSpec
  for name, tree in (('moved', state.carry['moved']), ('mu', state.carry['memory'][1].mu)):
    for address, leaf in flatten(tree).items():
      assert leaf.shape == (2, *params[address].shape), name
      assert leaf.sharding.spec == spec('replica', *params[address].sharding.spec), name
  for address, leaf in flatten(state.opt_state['momentum']).items():
    assert leaf.sharding.spec == params[address].sharding.spec
  assert state.carry['memory'][1].count.sharding.spec == spec('replica')
  assert state.carry['since'].sharding.spec == spec()


def test_experts_that_come_and_go_need_common_weights():
  """LocalSteps refuses them, with the reason."""
  chosen = program(2).experiment
  sparse = dataclasses.replace(
    chosen.model.feed_forward, growth=Growth(experts=((0.0, 4), (0.5, 8)))
  )
  chosen = dataclasses.replace(
    chosen,
    model=dataclasses.replace(chosen.model, feed_forward=sparse),
    reduction=LocalSteps(),
  )
  with pytest.raises(ConfigError, match='weights of their own between exchanges'):
    build_program(chosen)
