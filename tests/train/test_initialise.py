"""A run begins with another's weights, or its own in another grouping; all that differs is said."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.override import override
from deepseek_jax.core.serialise import to_json
from deepseek_jax.core.tree import flatten
from deepseek_jax.models.decoder import canonical, plan_segments
from deepseek_jax.models.remat import EveryLayer, SquareRoot
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import TENSOR
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.init_from import InitFrom
from deepseek_jax.train.initialise import open_origin, resume_state
from deepseek_jax.train.step import build_program


def experiment(**changes):
  """Six layers: one dense, five with experts."""
  return override(tiny_mla.get_config(), {'model.depth': 6, 'model.mtp': None, **changes})[0]


def by_layer(tree, config) -> dict[str, np.ndarray]:
  """Arrays by canonical address, by the model's own rule."""
  return flatten(canonical(tree, plan_segments(config.model, config.remat)))


def noisy(tree, seed: int):
  """The same shapes with numbers that are all different."""
  noise = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: jnp.asarray(noise.normal(size=leaf.shape)).astype(leaf.dtype), tree
  )


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A workdir with checkpoints of steps 4 and 8 of six layers, and their states."""
  path = tmp_path_factory.mktemp('source')
  config = experiment()
  shapes = build_program(config).abstract_state
  states = {}
  with Checkpoints(path / 'checkpoints') as checkpoints:
    for step in (4, 8):
      states[step] = dataclasses.replace(noisy(shapes, step), step=jnp.int32(step))
      checkpoints.save(step, states[step], {'step': step}, to_json(config))
  return path, config, states


def moments(state):
  """Adam's two averages, which are trees like the parameters."""
  leaves = jax.tree.leaves(
    state.opt_state, is_leaf=lambda node: isinstance(node, dict) and 'stack' in node
  )
  return [node for node in leaves if isinstance(node, dict)]


def test_a_run_goes_on_with_its_layers_in_other_scans(saved):
  path, config, states = saved
  regrouped = dataclasses.replace(config, remat=SquareRoot())
  assert plan_segments(config.model) != plan_segments(config.model, SquareRoot())
  program = build_program(regrouped)
  state = resume_state(program, Checkpoints(path / 'checkpoints'), 8)
  assert int(state.step) == 8
  old, new = states[8], state
  assert len(moments(old)) == len(moments(new)) >= 2
  pairs = [(old.params, new.params), (old.buffers, new.buffers), *zip(moments(old), moments(new))]
  for ours, theirs in pairs:
    left, right = by_layer(ours, config), by_layer(theirs, regrouped)
    assert set(left) == set(right)
    for address, leaf in left.items():
      np.testing.assert_array_equal(leaf, right[address], err_msg=address)
  wanted = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
  assert jax.tree.map(lambda leaf: leaf.sharding, state) == wanted


def test_the_same_grouping_needs_no_detour(saved):
  path, config, states = saved
  program = build_program(dataclasses.replace(config, remat=EveryLayer()))
  state = resume_state(program, Checkpoints(path / 'checkpoints'), 4)
  jax.tree.map(np.testing.assert_array_equal, state, states[4])


def test_a_regrouped_run_of_another_model_is_refused(saved):
  path, config, _ = saved
  other = override(config, {'model.depth': 7, 'remat': SquareRoot()})[0]
  with pytest.raises(ConfigError, match=r'params/layers/6/.*: found nothing'):
    resume_state(build_program(other), Checkpoints(path / 'checkpoints'), 8)


def begin(saved, path=None, step=None, **changes):
  """A new run's first state, what it came from, and its experiment."""
  origin = InitFrom(str(path or saved[0]), step=step)
  config = experiment(init_from=origin, **changes)
  program = build_program(config)
  found = open_origin(program)
  assert found is not None
  return found, found.load(program, program.init(jax.random.key(5))), config


def test_the_same_model_is_loaded_whole(saved):
  origin, state, _ = begin(saved)
  total = len(origin.target)
  assert origin.describe().split(': ') == [
    f'begins with {saved[0]}/checkpoints/8',
    f'{total} of {total} arrays loaded',
  ]
  jax.tree.map(np.testing.assert_array_equal, state.params, saved[2][8].params)
  jax.tree.map(np.testing.assert_array_equal, state.buffers, saved[2][8].buffers)
  assert int(state.step) == 0
  assert not any(np.any(leaf) for tree in moments(state) for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_another_depth_grouping_attention_mesh_and_vocabulary(saved, tmp_path):
  """What agrees is taken, layer by layer; every other address is named."""
  origin, state, config = begin(
    saved,
    **{
      'model.depth': 9,
      'model.attention': 'Window(size=16)',
      'model.vocab': 272,
      'remat': SquareRoot(),
      'mesh': MeshConfig(data=4, model=2),
      'rules': TENSOR,
    },
  )
  old = by_layer(saved[2][8].params, saved[1])
  new = by_layer(state.params, config)
  fresh = by_layer(build_program(config).init(jax.random.key(5)).params, config)
  loaded = 0
  for address, leaf in new.items():
    if address in old and old[address].shape == leaf.shape:
      loaded += 1
      np.testing.assert_array_equal(leaf, old[address], err_msg=address)
      assert f'params/{address}' in origin.transfer.sources
    else:
      np.testing.assert_array_equal(leaf, fresh[address], err_msg=address)
      assert (f'params/{address}' in origin.transfer.fresh) == (address not in old)
      assert (f'params/{address}' in origin.transfer.different) == (address in old)
  assert loaded > 30
  assert len(new) - loaded > 20
  unused = {f'params/{address}' for address in old if address not in new}
  assert unused == {name for name in origin.transfer.unused if name.startswith('params/')}
  text = origin.describe()
  assert 'params/layers/6–8/feed_forward/' in text
  assert 'of another shape there: ' in text
  assert 'head' in text.split('of another shape there: ')[1].splitlines()[0]
  origin.write(tmp_path / 'init_from.json')
  written = json.loads((tmp_path / 'init_from.json').read_text())
  assert set(written['fresh']) == set(origin.transfer.fresh)
  assert written['different']['params/head/weight'] == (
    'found float32[32, 264], expected float32[32, 272]'
  )


def test_layers_that_are_left_over_are_named(saved):
  config = experiment(init_from=InitFrom(str(saved[0])), **{'model.depth': 4})
  origin = open_origin(build_program(config))
  assert origin is not None
  assert ', params/layers/4–5/' in origin.describe().split('unused: ')[1]
  assert not origin.transfer.fresh


def test_averaged_weights(saved, tmp_path):
  path, config, states = saved
  average = noisy(states[8].params, 99)
  with Checkpoints(tmp_path / 'run' / 'checkpoints') as checkpoints:
    state = dataclasses.replace(states[8], ema=average)
    checkpoints.save(8, state, {'step': 8}, to_json(config))
  program = build_program(experiment(init_from=InitFrom(str(tmp_path / 'run'), weights='averaged')))
  origin = open_origin(program)
  assert origin is not None
  loaded = origin.load(program, program.init(jax.random.key(0)))
  jax.tree.map(np.testing.assert_array_equal, loaded.params, average)
  wrong = experiment(init_from=InitFrom(str(path), weights='averaged'))
  with pytest.raises(ConfigError, match='has no averaged weights'):
    open_origin(build_program(wrong))


def test_a_path_is_a_run_its_checkpoints_or_a_step(saved):
  path = saved[0]
  for given, step, found in (
    (path, None, 8),
    (path / 'checkpoints', 4, 4),
    (path / 'checkpoints' / '4', None, 4),
  ):
    program = build_program(experiment(init_from=InitFrom(str(given), step=step)))
    origin = open_origin(program)
    assert origin is not None
    assert origin.path == path / 'checkpoints' / str(found)


@pytest.mark.parametrize(
  ('changes', 'step', 'message'),
  [
    ({}, 5, 'no checkpoint of step 5; there are 4, 8'),
    ({'model.width': 48, 'model.attention.latent': 24, 'model.attention.query_latent': 32,
      'model.vocab': 272, 'model.dense.hidden': 72}, None, 'nothing of .* fits this model'),
  ],
)  # fmt: skip
def test_what_cannot_be_begun_with(saved, changes, step, message):
  config = experiment(init_from=InitFrom(str(saved[0]), step=step), **changes)
  with pytest.raises(ConfigError, match=message):
    open_origin(build_program(config))


def test_no_checkpoint_there(tmp_path):
  for path in (tmp_path, tmp_path / 'nowhere', pathlib.Path('/dev/null')):
    program = build_program(experiment(init_from=InitFrom(str(path))))
    with pytest.raises(ConfigError, match=r'init_from: .* holds no checkpoint'):
      open_origin(program)
  assert open_origin(build_program(experiment())) is None
  with pytest.raises(ConfigError, match=r'InitFrom\.path'):
    InitFrom('')
