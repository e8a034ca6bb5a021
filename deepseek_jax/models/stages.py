"""Runs the layers that are cut over pipeline stages, on all stages at once or in plain order.

A pure function of variables and streams: every stage applies its own slices of what a scan would
hold. What layers report comes back as a scan would report it, summed over the microbatches; ticks
of the bubble are left out.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.context import Context
from deepseek_jax.models.pipeline import AXIS, Job, Stages
from deepseek_jax.models.remat import REPORTS
from deepseek_jax.sharding.rules import Rules


class Layers(NamedTuple):
  """How a run of layers is applied.

  Attributes:
    module: applies one repeat, with variables of its own.
    reports: collections that it reports.
  """

  module: nn.Module
  reports: tuple[str, ...]

  def run(self, variables: Any, stream: Any, context: Context, keys: Any) -> tuple[Any, Any]:
    """Runs K repeats, one after the other.

    Args:
      variables: `params` and `buffers`, [K, ...] each.
      stream: such as [b, T, D].
      context: of its tokens.
      keys: [K] keys of the noise, or None.

    Returns:
      The stream, and what was reported, [K, ...] each.
    """

    def layer(stream: Any, given: Any) -> tuple[Any, Any]:
      own, key = given
      rngs = {} if key is None else {'noise': key}
      (stream, _), reported = self.module.apply(
        own, stream, context, mutable=list(self.reports), rngs=rngs
      )
      return stream, reported

    return jax.lax.scan(layer, stream, (variables, keys))


def run_stages(
  owner: nn.Module,
  module: nn.Module,
  numbers: Sequence[int],
  stages: Stages,
  stream: jax.Array,
  context: Context,
) -> jax.Array:
  """Runs the segments of a stack that are cut over stages.

  Args:
    owner: the stack, which has their variables; what they report is put there.
    module: applies one repeat.
    numbers: of the segments, one a round.
    stages: the schedule.
    stream: of any rank, such as [B, T, D].
    context: of the B · T tokens.

  Returns:
    The stream after them.
  """
  names = [f'segment_{number}' for number in numbers]
  layers = Layers(module, tuple(name for name in REPORTS if owner.is_mutable_collection(name)))
  variables = tuple(
    {part: owner.variables.get(part, {}).get(name, {}) for part in ('params', 'buffers')}
    for name in names
  )
  key = owner.make_rng('noise') if owner.has_rng('noise') else None
  count = stages.schedule.microbatches
  if stream.shape[0] % count:
    raise ConfigError(f'{stream.shape[0]} rows cannot be cut into {count} microbatches')

  inside = context.rules.without(AXIS)
  streams = _cut_rows(stream, count)
  contexts = dataclasses.replace(context.rows(lambda x: _cut_rows(x, count)), rules=inside)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or stages.count == 1:
    streams, reported = run_in_order(layers, stages, variables, streams, contexts, key)
  else:
    streams = _lay(streams, None, rules=inside)
    streams, reported = run_in_ticks(layers, stages, variables, streams, contexts, key)
    streams = _lay(streams, None, rules=inside)
  for name, report in zip(names, reported, strict=True):
    for collection, values in report.items():
      owner.put_variable(collection, name, values)
  stream = jnp.swapaxes(streams, 0, 1).reshape(stream.shape)
  return stream if mesh.empty else _lay(stream, rules=context.rules)


def run_in_order(
  layers: Layers, stages: Stages, variables: Any, streams: Any, contexts: Context, key: Any
) -> tuple[Any, list[Any]]:
  """Runs one microbatch after the other through all layers: what any schedule must equal.

  Args:
    layers: how.
    stages: the schedule, of which only the numbers of rounds and microbatches count.
    variables: of each round, [L, ...] each.
    streams: [M, b, ...].
    contexts: whose rows are [M, b, ...].
    key: of the noise, or None.

  Returns:
    The streams [M, b, ...], and for each round what was reported, [L, ...], summed over the
    microbatches.
  """
  count, each = stages.schedule.microbatches, _repeats(variables)
  run = jax.checkpoint(layers.run, prevent_cse=False)

  def through(_: None, given: Any) -> tuple[None, Any]:
    (microbatch, stream), reported = given, []
    context = _part_of(contexts, microbatch)
    for number, own in enumerate(variables):
      keys = _noise(key, microbatch, number * each + jnp.arange(each))
      stream, report = run(own, stream, context, keys)
      reported.append(report)
    return None, (stream, reported)

  _, (streams, reported) = jax.lax.scan(through, None, (jnp.arange(count), streams))
  return streams, jax.tree.map(lambda x: jnp.sum(x, axis=0), reported)


def run_in_ticks(
  layers: Layers, stages: Stages, variables: Any, streams: Any, contexts: Context, key: Any
) -> tuple[Any, list[Any]]:
  """Runs all stages at once, tick by tick; arguments and results are those of `run_in_order`.

  Variables lie on the mesh axis `stage` by their first axis; the other axes of the mesh are left to
  the compiler, and to the layers.
  """
  count, rounds = stages.count, stages.schedule.rounds
  each = _repeats(variables) // count
  ticks = np.arange(stages.ticks)
  fed = np.asarray(stages.job(ticks).microbatch)
  finished = np.array([stages.finish(m) for m in range(stages.schedule.microbatches)])

  def run(variables: Any, stream: Any, job: Job, first: Any, contexts: Context, key: Any):
    # Chosen where it is recomputed, so that no tick remembers a copy of the weights.
    own = jax.tree.map(lambda *leaves: _choose(job.round, leaves), *variables)
    context = _part_of(contexts, job.microbatch)
    return layers.run(own, stream, context, _noise(key, job.microbatch, first + jnp.arange(each)))

  run = jax.checkpoint(run, prevent_cse=False)

  def stage(number: Any, variables: Any, streams: Any, contexts: Context, key: Any):
    # Each stage has a number of its own: as an array, since the compiler has none for an axis
    # beside which there are others that it shares out itself.
    number, streams = number[0], streams[0]

    def tick(received: Any, given: Any) -> tuple[Any, Any]:
      time, entering = given
      job = stages.job(time - number)
      stream = jnp.where((number == 0) & (job.round == 0), entering, received)
      first = (job.round * count + number) * each
      stream, reported = run(variables, stream, job, first, contexts, key)
      ring = [(i, (i + 1) % count) for i in range(count)]
      return jax.lax.ppermute(stream, AXIS, ring), (stream, reported)

    # Idle stages run on a true stream: on zeros, something might not be finite.
    _, (left, reported) = jax.lax.scan(tick, streams[0], (jnp.asarray(ticks), streams[fed]))
    jobs = stages.job(jnp.asarray(ticks) - number)
    masks = [jobs.real & (jobs.round == turn) for turn in range(rounds)]
    return left[finished][None], [_sum_where(mask, reported) for mask in masks]

  whole, own = PartitionSpec(), PartitionSpec(AXIS)
  mapped = jax.shard_map(
    stage,
    # A copy of the streams for each stage, whose gradients are summed out here: inside, a sum over
    # the stages would be one of bfloat16, which XLA has been known to refuse on CPUs.
    in_specs=(own, own, own, whole, whole),
    out_specs=(own, own),
    axis_names={AXIS},
    check_vma=False,
  )
  copies = jnp.broadcast_to(streams, (count, *streams.shape))
  streams, reported = mapped(jnp.arange(count), variables, copies, contexts, key)
  return streams[-1], reported


def _repeats(variables: Any) -> int:
  """Repeats of a round on all stages together."""
  return jax.tree.leaves(variables)[0].shape[0]


def _noise(key: Any, microbatch: Any, layers: Any) -> Any:
  """Keys of layers [K] for a microbatch, whatever stage and tick these are met in."""
  if key is None:
    return None
  own = jax.random.fold_in(key, microbatch)
  return jax.vmap(lambda layer: jax.random.fold_in(own, layer))(layers)


def _choose(number: Any, leaves: Sequence[jax.Array]) -> jax.Array:
  return leaves[0] if len(leaves) == 1 else jax.lax.select_n(number, *leaves)


def _sum_where(real: jax.Array, tree: Any) -> Any:
  """Sums arrays [ticks, ...] over the ticks that are real."""

  def add(values: jax.Array) -> jax.Array:
    mask = real.reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.sum(jnp.where(mask, values, jnp.zeros_like(values)), axis=0)

  return jax.tree.map(add, tree)


def _cut_rows(x: jax.Array, parts: int) -> jax.Array:
  """Cuts [B, ...] into [parts, B / parts, ...], every part with rows of every device."""
  return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def _part_of(contexts: Context, microbatch: Any) -> Context:
  """The context of one microbatch, of those whose rows are [M, b, ...]."""
  return contexts.rows(lambda x: jax.lax.dynamic_index_in_dim(x, microbatch, 0, False))


def _lay(x: jax.Array, *before: None, rules: Rules) -> jax.Array:
  """Pins rows and tokens of an array of any rank, [..., B, T, ...]."""
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*before, *rules.spec(('batch', 'seq'))))
