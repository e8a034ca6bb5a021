"""The table of a hash router, an array of whole numbers, through a whole run."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.core.override import override
from deepseek_jax.core.serialise import to_json
from deepseek_jax.core.tree import flatten
from deepseek_jax.data.batch import Batch
from deepseek_jax.hub import from_pretrained
from deepseek_jax.layers.moe.router.hash import Hash
from deepseek_jax.layers.moe.router.table import TableFile
from deepseek_jax.models.remat import Compressed, SquareRoot
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.initialise import resume_state
from deepseek_jax.train.step import build_program


def tables(buffers):
  found = flatten(buffers)
  assert all(address.endswith('router/table') for address in found)
  return [np.asarray(table) for table in found.values()]


@pytest.mark.slow
def test_a_table_is_made_kept_saved_and_regrouped(tmp_path):
  rng = np.random.default_rng(0)
  table = np.argsort(rng.random((264, 8)), axis=1)[:, :2]
  file = tmp_path / 'table.npy'
  np.save(file, table)
  router = Hash(vocab=264, table=TableFile(path=str(file)))
  config, _ = override(
    tiny_mla.get_config(),
    {
      'model.mtp': None,
      'model.depth': 4,
      'model.dense_layers': 0,
      'model.feed_forward.router': router,
      'mesh': MeshConfig(data=2),
      # Its backward pass differentiates by buffers too, and must leave whole numbers alone.
      'remat': Compressed(block=4),
      'guard': None,
    },
  )
  devices = jax.devices()[:2]
  program = build_program(config, devices)
  key = jax.random.key(0)
  state = program.init.compile(key)(key)
  (made,) = tables(state.buffers)
  assert made.dtype == np.int32
  np.testing.assert_array_equal(made, [table] * 4)

  ids = rng.integers(0, 264, (8, 64)).astype(np.int32)
  ones, places = np.ones_like(ids), np.tile(np.arange(64, dtype=np.int32), (8, 1))
  batch = Batch(ids, ids, ones.astype(np.float32), places, ones, ones)
  batch = jax.device_put(batch, program.batch_sharding)
  state, metrics = program.step.compile(state, batch)(state, batch)
  assert np.isfinite(metrics['grad_norm'])
  (kept,) = tables(state.buffers)
  np.testing.assert_array_equal(kept, made)
  load = np.bincount(table[ids].ravel(), minlength=8)
  (observed,) = (v for k, v in flatten(metrics['observed']).items() if k.endswith('load'))
  np.testing.assert_array_equal(observed, [load] * 4)

  with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    checkpoints.save(1, state, {'step': 1}, to_json(config))
  regrouped = build_program(dataclasses.replace(config, remat=SquareRoot()), devices)
  found = tables(resume_state(regrouped, Checkpoints(tmp_path / 'checkpoints'), 1).buffers)
  assert [part.shape for part in found] == [(2, 264, 2)] * 2
  np.testing.assert_array_equal(np.concatenate(found), made)
  # A trained model has its table, wherever the file is by then.
  file.unlink()
  loaded = tables(from_pretrained(tmp_path).variables['buffers'])
  np.testing.assert_array_equal(loaded, made)
  assert {table.dtype for table in loaded} == {np.dtype(np.int32)}
