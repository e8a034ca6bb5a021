"""Fewer devices: the same batch, no more of it at once on any of them."""

import dataclasses

import pytest

from configs import tiny_mla
from deepseek_jax.core.config import ConfigError
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import EXPERT, TENSOR
from deepseek_jax.train.shrink import most_that_fit, shrink


def experiment(rows: int = 8, microbatches: int = 1, **changes):
  """A run of some rows."""
  base = tiny_mla.get_config()
  data = dataclasses.replace(base.data, batch_size=rows)
  return dataclasses.replace(base, data=data, microbatches=microbatches, **changes)


@pytest.mark.parametrize(
  ('run', 'before', 'after', 'sizes', 'parts'),
  [
    (experiment(), 4, 2, (1, 2, 1), 2),
    (experiment(), 4, 1, (1, 1, 1), 4),
    (experiment(microbatches=2), 4, 2, (1, 2, 1), 4),
    (experiment(12), 4, 3, (1, 3, 1), 2),
    # A replica goes; what shares the weights stays.
    (experiment(mesh=MeshConfig(replica=2, data=2)), 4, 2, (2, 1, 1), 2),
    (experiment(mesh=MeshConfig(replica=2, model=2), rules=TENSOR), 4, 2, (1, 1, 2), 2),
    (experiment(mesh=MeshConfig(data=2, expert=2), rules=EXPERT), 4, 2, (1, 1, 1), 2),
  ],
)
def test_the_batch_stays_and_parts_do_not_grow(run, before, after, sizes, parts):
  smaller = shrink(run, before, after)
  found = smaller.mesh.sizes(after)
  assert (found['replica'], found['data'], found['model']) == sizes
  assert smaller.microbatches == parts
  assert smaller.data == run.data
  assert smaller.check(after) == []
  each = run.data.batch_size / run.microbatches / before
  assert smaller.data.batch_size / smaller.microbatches / after <= each


def test_what_does_not_fit_is_refused():
  with pytest.raises(ConfigError, match='which take 2'):
    shrink(experiment(mesh=MeshConfig(model=2), rules=TENSOR), 4, 3)
  with pytest.raises(ConfigError, match='batch_size 8'):
    shrink(experiment(), 4, 3)


def test_the_most_processes_that_fit():
  assert most_that_fit(experiment(), 4, 1)[0] == 2
  assert most_that_fit(experiment(12), 4, 1)[0] == 3
  assert most_that_fit(experiment(mesh=MeshConfig(model=2), rules=TENSOR), 4, 1)[0] == 2
  with pytest.raises(ConfigError, match='no fewer than 2'):
    most_that_fit(experiment(mesh=MeshConfig(model=2), rules=TENSOR), 2, 1)
