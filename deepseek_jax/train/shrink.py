"""The same run on fewer devices: a smaller mesh, the same batch, in more parts."""

import dataclasses
import math

from deepseek_jax.core.config import ConfigError
from deepseek_jax.sharding.rules import shard_count
from deepseek_jax.train.experiment import Experiment


def shrink(experiment: Experiment, before: int, after: int) -> Experiment:
  """Returns a run as it goes on with fewer devices, after a host was lost.

  Stages, sequence, experts and heads stay spread as they are; replicas go first, then data. The
  rows of a batch stay the same, and so does what a device holds of each part of it, or less: parts
  that no longer fit side by side are run one after the other (`microbatches`). A checkpoint fits,
  and the data go on where they were, since neither depends on the mesh.

  Args:
    experiment: what ran.
    before: devices that it ran on.
    after: devices that are left.

  Raises:
    ConfigError: it does not fit on so many devices.
  """
  sizes = experiment.mesh.sizes(before)
  fixed = math.prod(size for axis, size in sizes.items() if axis not in ('replica', 'data'))
  if after % fixed:
    raise ConfigError(
      f'{after} devices cannot be shared among stage, seq, expert and model, which take {fixed}'
    )
  replicas = math.gcd(sizes['replica'], after // fixed)
  mesh = dataclasses.replace(experiment.mesh, replica=replicas, data=after // fixed // replicas)
  shards = shard_count(experiment.rules.spec(('batch',))[0], mesh.sizes(after))
  rows = experiment.data.batch_size
  least = math.ceil(experiment.microbatches * before / after)
  for parts in range(least, rows + 1):
    if rows % parts == 0 and rows // parts % shards == 0:
      return dataclasses.replace(experiment, mesh=mesh, microbatches=parts)
  raise ConfigError(
    f'data.batch_size {rows} cannot be cut into {least} or more equal parts for {shards} devices'
  )


def most_that_fit(experiment: Experiment, processes: int, devices: int) -> tuple[int, Experiment]:
  """Returns with how many processes a run goes on after it has lost one, and how.

  Args:
    experiment: what ran.
    processes: that it ran in.
    devices: of each.

  Raises:
    ConfigError: it fits on no fewer.
  """
  for count in range(processes - 1, 0, -1):
    try:
      smaller = shrink(experiment, processes * devices, count * devices)
    except ConfigError:
      continue
    if not smaller.check(count * devices):
      return count, smaller
  raise ConfigError(f'the run fits on no fewer than {processes} processes')
