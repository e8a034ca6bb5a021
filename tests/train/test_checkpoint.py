"""Checkpoints are whole or absent, keep the right steps, and restore on any mesh."""

import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from deepseek_jax.core.config import ConfigError
from deepseek_jax.train.checkpoint import Checkpoints, restore_params
from deepseek_jax.train.checkpoint_reader import read_params

CONFIG = {'name': 'tiny', 'depth': 2, 'limit': None, 'sizes': [1, 2]}


@struct.dataclass
class State:
  """Shaped like a train state, with empty sub-trees."""

  step: Any
  params: Any
  buffers: Any
  opt_state: Any
  ema: Any = ()
  guard: Any = ()
  carry: Any = ()


def make_state(step: int, width: int = 5) -> State:
  keys = jax.random.split(jax.random.key(step), 3)
  params = {
    'embed': jax.random.normal(keys[0], (7, width)),
    'layers': {
      '0': {
        'up': jax.random.normal(keys[1], (3, width), jnp.bfloat16),
        'down': jax.random.normal(keys[2], (width,)),
      }
    },
    'none': {},
  }
  mask = {'embed': True, 'layers': {'0': {'up': True, 'down': False}}, 'none': {}}
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3, mask=mask), mask)
  )
  buffers = {'layers': {'0': {'bias': jnp.full((4,), step / 3)}}}
  return State(jnp.int32(step), params, buffers, optimizer.init(params))


def abstract(state: Any) -> Any:
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
  )


def assert_same(found: Any, expected: Any) -> None:
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  assert jax.tree.leaves(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_saved_state_comes_back_whole(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  state = make_state(120)
  with Checkpoints('run/checkpoints') as checkpoints:
    assert checkpoints.directory == tmp_path / 'run' / 'checkpoints'
    assert checkpoints.latest() is None
    assert not (tmp_path / 'run').exists()
    checkpoints.save(120, state, {'step': 120}, CONFIG, {'loss': np.float32(2.5)})
    assert 120 in checkpoints
    checkpoints.wait()
    restored = checkpoints.restore(abstract(state))
    assert checkpoints.read_metrics() == {'loss': 2.5}
  assert isinstance(restored.state, State)
  assert_same(restored.state, state)
  assert restored.state.ema == ()
  assert (restored.step, restored.data_state, restored.config) == (120, {'step': 120}, CONFIG)
  assert Checkpoints('run/checkpoints').read_config() == CONFIG


def test_donated_buffers_do_not_reach_the_disk(tmp_path):
  state = {'params': {str(i): jnp.full((512, 1024), float(i)) for i in range(8)}, 'buffers': {}}
  spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {}, {})
    for _ in range(3):
      state = spoil(state)
    jax.block_until_ready(state)
  params, _, _ = restore_params(tmp_path)
  assert {name: (x.min(), x.max()) for name, x in params.items()} == {
    str(i): (i, i) for i in range(8)
  }


def test_the_newest_and_the_best_are_kept_across_a_restart(tmp_path):
  scores = {1: 3.0, 2: 1.0, 3: 2.0, 4: float('nan'), 5: 1.5, 6: 1.0, 7: 4.0}
  state = {'params': jnp.ones(3)}
  for steps in ((1, 2, 3, 4), (5,), (6, 7)):
    with Checkpoints(tmp_path, keep=2, best_metric='bpb') as checkpoints:
      for step in steps:
        checkpoints.save(step, state, {}, {}, {'bpb': scores[step]})
    kept = Checkpoints(tmp_path, best_metric='bpb')
    newest = steps[-1]
    best = {4: 2, 5: 2, 7: 6}[newest]
    assert kept.steps() == tuple(sorted({best, newest - 1, newest}))
    assert kept.best() == best
    assert kept.latest() == newest
  assert Checkpoints(tmp_path).best() is None


def test_a_step_is_never_overwritten(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, {'params': jnp.ones(3)}, {}, {})
    with pytest.raises(ConfigError, match='never overwritten'):
      checkpoints.save(3, {'params': jnp.zeros(3)}, {}, {})
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(ConfigError, match='never overwritten'):
      checkpoints.save(3, {'params': jnp.zeros(3)}, {}, {})
    restored = checkpoints.restore({'params': jax.ShapeDtypeStruct((3,), jnp.float32)})
  np.testing.assert_array_equal(restored.state['params'], np.ones(3))


def test_what_json_would_change_is_refused(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  for data_state, config in (({}, {'a': (1, 2)}), ({1: 2}, {}), ({'a': {1}}, {}), ([], {})):
    with pytest.raises(ConfigError, match='expected a JSON object'):
      checkpoints.save(1, {'params': jnp.ones(1)}, data_state, config)
  assert checkpoints.steps() == ()
  with pytest.raises(ConfigError, match='at least 1, found 0'):
    Checkpoints(tmp_path, keep=0)


def test_missing_checkpoints_are_named(tmp_path):
  with pytest.raises(ConfigError, match='no such directory'):
    Checkpoints(tmp_path / 'nowhere').restore({})
  with pytest.raises(ConfigError, match='holds no finished checkpoint'):
    restore_params(tmp_path)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(2, {'params': jnp.ones(3)}, {}, {})
  with pytest.raises(ConfigError, match='no checkpoint of step 5; there are 2'):
    Checkpoints(tmp_path).read_config(5)
  with pytest.raises(ConfigError, match=r"expected a state with params and buffers.*\['params'\]"):
    restore_params(tmp_path)


def test_a_different_tree_is_explained(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, make_state(1), {}, {})
    wanted = abstract(make_state(1, width=6))
    wanted = wanted.replace(
      ema={'new': jax.ShapeDtypeStruct((2,), jnp.int8)}, buffers=(), step=wanted.step
    )
    with pytest.raises(ConfigError) as caught:
      checkpoints.restore(wanted)
  messages = caught.value.messages
  assert '9 of 11 arrays differ' in messages[0]
  assert 'params/embed: found float32[7, 5], expected float32[7, 6]' in messages
  assert 'params/layers/0/up: found bfloat16[3, 5], expected bfloat16[3, 6]' in messages
  assert messages[-1] == '… and 1 more'
  assert len(messages) == 10
  narrow = {'params': jax.ShapeDtypeStruct((3,), jnp.bfloat16)}
  with Checkpoints(tmp_path / 'b') as checkpoints:
    checkpoints.save(1, {'params': jnp.ones(3), 'more': jnp.ones(1)}, {}, {})
    checkpoints.wait()
    with pytest.raises(ConfigError) as caught:
      checkpoints.restore(narrow)
  assert caught.value.messages[1:] == (
    'params: found float32[3], expected bfloat16[3]',
    'more: found float32[1], expected nothing',
  )


def test_a_damaged_checkpoint_is_reported(tmp_path):
  # One array: when several fail, Orbax abandons the reads of the others noisily.
  state = {'params': jax.random.normal(jax.random.key(0), (64, 64)), 'buffers': {}}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {}, {})
  for path in sorted((tmp_path / '1' / 'state' / 'd').iterdir()):
    path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(ConfigError, match='cannot be read'):
    Checkpoints(tmp_path).restore(abstract(state), 1)
  with pytest.raises(ConfigError, match='is damaged'):
    Checkpoints(tmp_path).restore(abstract(state))
  with pytest.raises(ConfigError, match='is damaged'):
    restore_params(tmp_path)
  (tmp_path / '1' / 'config' / 'data.json').write_text('{')
  with pytest.raises(ConfigError, match='cannot be read'):
    Checkpoints(tmp_path).read_config()


def test_inference_reads_weights_and_buffers_as_numpy(tmp_path):
  state = make_state(9)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(8, make_state(8), {}, {})
    checkpoints.save(9, state, {}, CONFIG)
  params, buffers, config = restore_params(tmp_path)
  assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves((params, buffers)))
  assert_same(params, state.params)
  assert_same(buffers, state.buffers)
  assert config == CONFIG
  assert_same(restore_params(tmp_path, 8)[0], make_state(8).params)


def test_a_relative_path_is_as_good(tmp_path, monkeypatch):
  """As `--workdir=runs/first` gives it; Orbax wants absolute ones."""
  state = make_state(9)
  with Checkpoints(tmp_path / 'run') as checkpoints:
    checkpoints.save(9, state, {}, CONFIG)
  monkeypatch.chdir(tmp_path)
  params, buffers, config = read_params(pathlib.Path('run/9'))
  assert_same(params, state.params)
  assert_same(buffers, state.buffers)
  assert config == CONFIG


def test_unfinished_directories_are_not_checkpoints(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {'params': jnp.ones(3)}, {}, {})
  (tmp_path / '2.orbax-checkpoint-tmp').mkdir()
  (tmp_path / '3' / 'state').mkdir(parents=True)
  (tmp_path / 'notes').mkdir()
  assert Checkpoints(tmp_path).latest() == 1
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(2, {'params': jnp.ones(3)}, {}, {})
    checkpoints.wait()
    assert checkpoints.steps() == (1, 2)
    assert not (tmp_path / '2.orbax-checkpoint-tmp').exists()


def test_no_thread_and_no_log_filter_is_left(tmp_path):
  logger = logging.getLogger('absl')
  filters, before = list(logger.filters), set(threading.enumerate())
  with Checkpoints(tmp_path) as checkpoints:
    for step in range(4):
      checkpoints.save(step, {'params': jnp.ones(3)}, {}, {})
  for thread in set(threading.enumerate()) - before:
    thread.join(timeout=5)
  assert not [thread for thread in threading.enumerate() if thread not in before]
  assert logger.filters == filters


def run_python(code: str, *arguments: str, devices: int = 1) -> subprocess.Popen:
  environ = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    'PYTHONPATH': str(pathlib.Path(__file__).parents[2]),
  }
  return subprocess.Popen(
    [sys.executable, '-W', 'error', '-c', textwrap.dedent(code), *arguments],
    env=environ,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


ENDLESS_SAVES = """
  import sys
  import jax.numpy as jnp
  from deepseek_jax.train.checkpoint import Checkpoints
  checkpoints = Checkpoints(sys.argv[1], keep=2)
  step = (checkpoints.latest() or 0) + 1
  while True:
    params = {str(i): jnp.full((512, 512), float(step)) for i in range(8)}
    checkpoints.save(step, {'params': params, 'buffers': {}}, {'step': step}, {})
    print(step, flush=True)
    step += 1
"""


def test_a_killed_save_leaves_whole_checkpoints(tmp_path):
  unfinished = 0
  for delay in (0.0, 0.01, 0.03):
    process = run_python(ENDLESS_SAVES, str(tmp_path))
    assert process.stdout is not None
    # The third line says that the third save of this process has begun.
    for _ in range(3):
      assert process.stdout.readline().strip().isdecimal()
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    process.communicate()
    unfinished += sum('tmp' in path.name for path in tmp_path.iterdir())
    step = Checkpoints(tmp_path).latest()
    assert step is not None
    params, _, _ = restore_params(tmp_path)
    assert {(x.min(), x.max()) for x in params.values()} == {(step, step)}
    one = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    restored = Checkpoints(tmp_path).restore(
      {'params': {str(i): one for i in range(8)}, 'buffers': {}}
    )
    assert restored.data_state == {'step': step}
    np.testing.assert_array_equal(restored.state['params']['7'], np.full((512, 512), step))
  assert unfinished, 'no kill came in the middle of a save'


TWO_MESHES = """
  import sys
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.sharding import NamedSharding, PartitionSpec as P
  from deepseek_jax.train.checkpoint import Checkpoints, restore_params

  def mesh(shape):
    return jax.sharding.Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), ('a', 'b'))

  values = {
    'w': jax.random.normal(jax.random.key(0), (8, 12)),
    'v': jax.random.normal(jax.random.key(1), (16,), jnp.bfloat16),
    's': jnp.float32(3),
  }

  def shardings(shape, specs):
    return {name: NamedSharding(mesh(shape), spec) for name, spec in specs.items()}

  saved = shardings((2, 4), {'w': P('a', 'b'), 'v': P(('a', 'b')), 's': P()})
  wanted = shardings((3, 2), {'w': P('b', 'a'), 'v': P('b'), 's': P()})
  state = {'params': jax.device_put(values, saved), 'buffers': ()}
  assert len(state['params']['w'].addressable_shards) == 8
  with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(4, state, {}, {})
    checkpoints.wait()
    abstract = {'params': jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), values, wanted
    ), 'buffers': ()}
    restored = checkpoints.restore(abstract).state
  for name, value in values.items():
    assert restored['params'][name].sharding == wanted[name], name
    np.testing.assert_array_equal(np.asarray(restored['params'][name]), np.asarray(value))
  np.testing.assert_array_equal(restore_params(sys.argv[1])[0]['w'], np.asarray(values['w']))
  print('equal')
"""


def test_a_checkpoint_is_restored_on_another_mesh(tmp_path):
  process = run_python(TWO_MESHES, str(tmp_path), devices=8)
  out, err = process.communicate(timeout=120)
  assert (process.returncode, out) == (0, 'equal\n'), err


SAVE_AND_EXIT = """
  import sys, time
  import jax.numpy as jnp
  from absl import logging
  logging.set_verbosity(logging.INFO)
  logging.use_absl_handler()
  from deepseek_jax.train.checkpoint import Checkpoints
  with Checkpoints(sys.argv[1]) as checkpoints:
    for step in range(3):
      checkpoints.save(step, {'params': jnp.ones((512, 512)), 'buffers': {}}, {}, {})
  logging.info('ours')
  print(time.time(), flush=True)
"""


def test_the_process_exits_promptly_and_quietly(tmp_path):
  process = run_python(SAVE_AND_EXIT, str(tmp_path))
  out, err = process.communicate(timeout=120)
  finished = time.time()
  assert process.returncode == 0, err
  assert finished - float(out) < 5
  assert 'ours' in err
  assert 'orbax' not in err
  assert len([line for line in err.splitlines() if 'flag parsing' not in line]) == 1, err


def test_the_layout_is_plain(tmp_path):
  """Other tools may read the JSON parts without Orbax."""
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {'params': jnp.ones(3)}, {'step': 1}, CONFIG, {'loss': 1.0})
  assert json.loads((tmp_path / '1' / 'config' / 'data.json').read_text()) == CONFIG
  assert json.loads((tmp_path / '1' / 'data_state' / 'data.json').read_text()) == {'step': 1}
