"""Attention of a sequence that devices share: each has its own queries, and keys come to it.

For use inside of `shard_map`, where an axis of the mesh has a part of the tokens on each device.
What travels is what keys and values are made of (`Keys.source`), which for latent attention is a
small part of them; each device makes them anew. In `attend_around` parts of the keys go around a
ring: a device holds its own and one other part at a time, forward and backward. In
`attend_gathered` they are all gathered first.

Order in the row means nothing here: who sees whom is told by positions and segments alone.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.attention.blocked import (
  NONE,
  attend_blocked,
  backward_part,
  forward_part,
  softmax_drift,
)
from deepseek_jax.ops.attention.blocks import FLOOR, Back, Static
from deepseek_jax.ops.attention.reference import Seen

Axes = tuple[str, ...]
"""Mesh axes that share the sequence, the slowest first."""

Expand = Callable[[Any, Any], tuple[jax.Array, jax.Array]]
"""(source, weights) -> keys [B, S, G, K] and values [B, S, G, V]."""


class Keys(NamedTuple):
  """What a device has of the keys.

  Attributes:
    source: arrays [B, S, …] that keys and values are made of; they travel.
    weights: arrays that they are made with; every device has the same.
    expand: makes them.
  """

  source: Any
  weights: Any
  expand: Expand


class Facts(NamedTuple):
  """Position and segment of each token [B, S] int32; position -1 is nobody's key."""

  positions: jax.Array
  segments: jax.Array


def own_facts(seen: Seen) -> Facts:
  """Returns the facts of a device's tokens as keys; padding, whose segment is 0, is none."""
  segments = seen.key_segments
  if segments is None:
    return Facts(seen.key_positions, jnp.ones_like(seen.key_positions))
  return Facts(jnp.where(segments > 0, seen.key_positions, -1), segments)


def seen_from(seen: Seen, facts: Facts) -> Seen:
  """Says which of some keys the queries of `seen` may see."""
  segments = seen.query_segments
  if segments is None:
    segments = jnp.ones_like(seen.query_positions)
  return Seen(seen.query_positions, facts.positions, segments, facts.segments)


def touches(seen: Seen) -> jax.Array:
  """Says whether any query may see any key, [] bool; cheap, and true where it cannot tell."""
  real = jnp.where(seen.key_positions >= 0, seen.key_positions, jnp.iinfo(jnp.int32).max)
  rows = jnp.min(real, axis=1) <= jnp.max(seen.query_positions, axis=1)
  if seen.query_segments is not None and seen.key_segments is not None:
    queries, keys = seen.query_segments, seen.key_segments
    rows &= jnp.min(queries, axis=1) <= jnp.max(keys, axis=1)
    rows &= jnp.min(keys, axis=1) <= jnp.max(queries, axis=1)
  return jnp.any(rows)


def attend_gathered(
  query: jax.Array, keys: Keys, seen: Seen, *, scale: float, axes: Axes
) -> jax.Array:
  """Gathers what keys are made of, makes all of them, and attends.

  Args:
    query: [B, T, H, K] of this device.
    keys: of this device.
    seen: who of this device sees whom of it.
    scale: factor on the scores.
    axes: mesh axes that share the sequence.

  Returns:
    [B, T, H, V].
  """
  facts = own_facts(seen)
  source, facts = gather((keys.source, facts), axes)
  key, value = keys.expand(source, keys.weights)
  return attend_blocked(query, key, value, seen_from(seen, facts), scale=scale)


def gather(tree: Any, axes: Axes) -> Any:
  """Returns arrays [B, S, …] of all devices, one after the other along axis 1."""
  with jax.named_scope('gather_keys'):
    return jax.tree.map(lambda x: lax.all_gather(x, axes, axis=1, tiled=True), tree)


def attend_around(
  query: jax.Array, keys: Keys, seen: Seen, *, scale: float, axes: Axes
) -> jax.Array:
  """Attends to the keys of every device while they go around a ring.

  A part of which no query sees a key is passed on and nothing else is done with it. In the gradient
  the parts go around once more, each with the sum of what devices add to its gradient, in float32.
  Memory is that of the device's own tokens and of one other part.

  Args:
    query: [B, T, H, K] of this device.
    keys: of this device.
    seen: who of this device sees whom of it.
    scale: factor on the scores.
    axes: mesh axes that share the sequence.

  Returns:
    [B, T, H, V].

  Source: Liu et al., arXiv 2310.01889, section 3; merged by their log-sums: Milakov and Gimelshein,
    arXiv 1805.02867, section 3.1.
  """
  run = functools.partial(_around, keys.expand, axes, scale)
  with jax.named_scope('ring'):
    return run(query, keys.source, keys.weights, seen, own_facts(seen))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _around(expand, axes, scale, query, source, weights, seen, facts):
  return _forward(expand, axes, scale, query, source, weights, seen, facts)[0]


def _forward(expand, axes, scale, query, source, weights, seen, facts):
  def part(source, facts, own: bool = False):
    """Outputs and log-sums over the keys that are here."""
    there = seen_from(seen, facts)

    def attend():
      key, value = expand(source, weights)
      out, log_sum = forward_part(query, key, value, NONE, there, Static(scale, None, own))
      return out.astype(jnp.float32), log_sum

    shapes = jax.eval_shape(attend)

    def pass_on():
      return tuple(jnp.full(s.shape, fill, s.dtype) for s, fill in zip(shapes, (0.0, FLOOR)))

    return lax.cond(touches(there), attend, pass_on)

  def step(carry, _):
    merged, here = carry
    # Sent before it is used, so that one part travels while another is attended to.
    there = pass_along(here, axes)
    return (merge(merged, part(*here)), there), None

  dtype = jax.eval_shape(lambda: expand(source, weights))[1].dtype
  merged, here = part(source, facts, own=True), (source, facts)
  count = lax.axis_size(axes)
  if count > 1:
    here = pass_along(here, axes)
    (merged, here), _ = lax.scan(step, (merged, here), length=count - 2)
    merged = merge(merged, part(*here))
  out, log_sum = merged
  out = out.astype(dtype)
  return out, (query, source, weights, seen, facts, out, log_sum)


def merge(
  one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Joins attention over two sets of keys: outputs [B, T, H, V], log-sums [B, T, H], float32."""
  log_sum = jnp.logaddexp(one[1], other[1])
  first, second = (jnp.exp(log - log_sum)[..., None] for log in (one[1], other[1]))
  return one[0] * first + other[0] * second, log_sum


def pass_along(tree: Any, axes: Axes) -> Any:
  """Gives arrays to the next device of the ring, and returns those of the one before."""
  count = lax.axis_size(axes)
  ring = [(place, (place + 1) % count) for place in range(count)]
  with jax.named_scope('pass_along'):
    return jax.tree.map(lambda x: lax.ppermute(x, axes, ring), tree)


def _backward(expand, axes, scale, saved, grad):
  query, source, weights, seen, facts, out, log_sum = saved
  back = Back(log_sum, softmax_drift(out, grad), grad)
  wide = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)  # noqa: E731
  add = lambda a, b: jax.tree.map(lambda x, y: x + y.astype(x.dtype), a, b)  # noqa: E731

  def part(sums, source, facts, own: bool = False):
    """Adds what the keys that are here give: to queries, weights and their own sources."""
    there = seen_from(seen, facts)

    def pull():
      (key, value), pull = jax.vjp(expand, source, weights)
      static = Static(scale, None, own)
      to_query, *to_keys, _ = backward_part(query, key, value, NONE, there, static, back)
      to_source, to_weights = pull(tuple(to_keys))
      return add(sums, (to_query, to_weights, to_source))

    return lax.cond(touches(there), pull, lambda: sums)

  def step(carry, _):
    (to_query, to_weights, to_source), here = carry
    there = pass_along(here, axes)
    to_query, to_weights, to_source = part((to_query, to_weights, to_source), *here)
    return ((to_query, to_weights, pass_along(to_source, axes)), there), None

  here = source, facts
  sums = part((wide(query), wide(weights), wide(source)), *here, own=True)
  count = lax.axis_size(axes)
  if count > 1:
    here, home = pass_along((here, sums[2]), axes)
    ((to_query, to_weights, home), here), _ = lax.scan(
      step, ((*sums[:2], home), here), length=count - 2
    )
    to_query, to_weights, home = part((to_query, to_weights, home), *here)
    sums = to_query, to_weights, pass_along(home, axes)
  like = lambda tree, given: jax.tree.map(lambda x, y: x.astype(y.dtype), tree, given)  # noqa: E731
  to_query, to_weights, to_source = like(sums, (query, weights, source))
  return to_query, to_source, to_weights, None, None


_around.defvjp(_forward, _backward)
