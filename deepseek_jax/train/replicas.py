"""Replicas that have gradients of their own, and how these are added up.

Left alone, the compiler sums gradients over the whole batch, where and as it likes. Here each
replica first has the gradients of its own rows, arrays [R, ...] that lie along the mesh axis
`replica`; what then crosses from replica to replica is written down.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from deepseek_jax.core.tree import flatten, unflatten
from deepseek_jax.data.batch import Batch
from deepseek_jax.optim.compression import Exact, Quantised, buckets, sum_tree
from deepseek_jax.sharding.rules import Rules, shard_count

AXIS = 'replica'
"""The mesh axis of the replicas."""

Carry = Any
"""`TrainState.carry`: empty, or a dict whose arrays but for scalars are [R, ...]."""


def check_replicas(rules: Rules) -> list[str]:
  """Returns what keeps replicas from having gradients of their own, as messages."""
  errors = []
  if rules.batch[:1] != (AXIS,):
    errors.append(
      f'reduction: rules.batch is {rules.batch}; expected `{AXIS}` first, so that each replica has '
      'rows of its own'
    )
  errors += [
    f'reduction: rules.{field.name} is {getattr(rules, field.name)}; along `{AXIS}` weights are '
    'whole'
    for field in dataclasses.fields(rules)
    if field.name != 'batch' and AXIS in getattr(rules, field.name)
  ]
  return errors


def over_replicas(
  function: Callable[[Any, Any], Any],
) -> Callable[[Any, Any], Any]:
  """Returns `(shared, own) -> results` that runs a function once for each replica, by itself.

  Args:
    function: `(shared, own) -> results`, of one replica; where arrays lie within it, it may say.

  Returns:
    The function of what replicas share and of arrays [R, ...] of their own; results are [R, ...].
  """

  def one(shared: Any, own: Any) -> Any:
    results = function(shared, jax.tree.map(lambda x: x[0], own))
    return jax.tree.map(lambda x: x[None], results)

  def run(shared: Any, own: Any) -> Any:
    lies = PartitionSpec(AXIS)
    mapped = jax.shard_map(
      one, in_specs=(PartitionSpec(), lies), out_specs=lies, axis_names={AXIS}, check_vma=False
    )
    return mapped(shared, own)

  return run


def split_replicas(batch: Batch, replicas: int) -> Batch:
  """Cuts [B, T] into [R, B / R, T], each replica the rows that it has."""
  return jax.tree.map(lambda x: x.reshape(replicas, -1, *x.shape[1:]), batch)


def carry_spec(leaf: Any, parameter: PartitionSpec | None) -> PartitionSpec:
  """Returns how an array of the carry lies: [R, ...] like the parameter at its address.

  Args:
    leaf: the array or its shape.
    parameter: how the parameter lies, or None where the array is at no parameter's address.
  """
  return PartitionSpec(*(AXIS,) * (leaf.ndim > 0), *(parameter or ()))


def saved_replicas(carry: Any) -> int | None:
  """Returns for how many replicas R the arrays [R, ...] of a carry are; None where there are none.

  Args:
    carry: arrays or their shapes.
  """
  return next((leaf.shape[0] for leaf in jax.tree.leaves(carry) if leaf.shape), None)


def refit_carry(carry: Carry, replicas: int) -> Carry:
  """Returns what other replicas go on with: as many as are asked for, all with the same.

  Of errors, which replicas have yet to add to the sum, each gets its share of the total, so that
  nothing is lost. Of what replicas of LocalSteps have moved, and of their optimizers, each gets the
  mean.

  Args:
    carry: of any number of replicas.
    replicas: R.
  """

  def refit(name: str, leaf: jax.Array) -> jax.Array:
    if not leaf.ndim:
      return leaf
    if name == 'error':
      one = jnp.sum(leaf, axis=0) / replicas
    elif jnp.issubdtype(leaf.dtype, jnp.integer):
      one = jnp.max(leaf, axis=0)
    else:
      one = jnp.mean(leaf, axis=0)
    return jnp.repeat(one[None].astype(leaf.dtype), replicas, axis=0)

  return {
    name: jax.tree.map(lambda leaf: refit(name, leaf), tree)  # noqa: B023
    for name, tree in carry.items()
  }


def make_reduction(
  kind: Exact | Quantised | None, specs: Any
) -> Callable[[Any, Carry], tuple[Any, Carry, dict[str, jax.Array]]]:
  """Returns the function that adds up the gradients of replicas.

  Args:
    kind: how.
    specs: how each parameter lies on the mesh.

  Returns:
    `(gradients, carry) -> (sums, carry, report)`: gradients are trees of [R, ...] float32, sums
    [...]. The report has `exchanged_bytes`, what a device sends to other replicas, and
    `exchange_error`, the norm of what rounding took away as a share of that of the sums. Without a
    kind gradients are sums already, and are returned.
  """
  if kind is None:
    return lambda grads, carry: (grads, carry, {})
  lies: dict[str, PartitionSpec] = flatten(specs)
  own = {address: PartitionSpec(AXIS, *spec) for address, spec in lies.items()}

  def exchange(grads: dict[str, jax.Array]) -> tuple[Any, Any]:
    totals, errors = sum_tree(kind, {name: leaf[0] for name, leaf in grads.items()}, AXIS)
    return totals, {name: leaf[None] for name, leaf in errors.items()}

  def reduce(grads: Any, carry: Carry) -> tuple[Any, Carry, dict[str, jax.Array]]:
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    flat = flatten(grads)
    if kind.feedback is not None:
      decay = kind.feedback.decay
      flat = {name: flat[name] + decay * leaf for name, leaf in flatten(carry['error']).items()}
    if sizes[AXIS] == 1:
      # Nothing travels, and so nothing is rounded; what was kept goes where it belongs.
      totals = {name: leaf[0] for name, leaf in flat.items()}
      errors = {name: jnp.zeros_like(leaf) for name, leaf in flat.items()}
    else:
      mapped = jax.shard_map(exchange, in_specs=(own,), out_specs=(lies, own), check_vma=False)
      totals, errors = mapped(flat)
    norm = optax.tree.norm(totals)
    report = {
      'exchange_error': optax.tree.norm(errors) / jnp.where(norm > 0, norm, 1),
      'exchanged_bytes': jnp.float32(exchanged_bytes(kind, grads, specs, sizes)),
    }
    kept = () if kind.feedback is None else {'error': unflatten(errors)}
    return unflatten(totals), kept, report

  return reduce


def exchanged_bytes(kind: Exact | Quantised, grads: Any, specs: Any, sizes: dict[str, int]) -> int:
  """Returns the bytes that a device sends to other replicas to add gradients up once.

  Args:
    kind: how.
    grads: tree of [R, ...].
    specs: how each parameter lies on the mesh.
    sizes: of the mesh axes.
  """
  shards = {
    name: math.prod(
      size // shard_count(entry, sizes) for size, entry in zip(leaf.shape[1:], spec, strict=True)
    )
    for (name, leaf), spec in zip(flatten(grads).items(), flatten(specs).values(), strict=True)
  }
  if sizes[AXIS] == 1:
    return 0
  return sum(
    kind.sent_bytes([shards[name] for name in names], sizes[AXIS])
    for names in buckets(tuple(shards)).values()
  )
