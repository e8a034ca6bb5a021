"""Losses that bring the two halves of a pair together, and others apart."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.ops.attention.reference import MASKED


class Pairs(NamedTuple):
  """N pairs of vectors; row n of one belongs to row n of the other.

  Attributes:
    left: [N, K] float32 of length 1.
    right: [N, K] float32 of length 1.
    real: [N] bool; the others count for nothing.
  """

  left: jax.Array
  right: jax.Array
  real: jax.Array


def unit(x: jax.Array) -> jax.Array:
  """Divides vectors [..., K] by their length, in float32; one of zeros stays that."""
  wide = x.astype(jnp.float32)
  return wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + 1e-12)


def info_nce(
  mine: Pairs, every: Pairs, places: jax.Array, scale: jax.Array, hardness: float
) -> jax.Array:
  """Cross-entropy of finding each vector's partner among all, in both directions.

  Args:
    mine: n pairs.
    every: all N pairs, mine among them.
    places: [n] int32 where mine are in all.
    scale: [] float32 inverse temperature, factor on the similarities.
    hardness: 0 for negatives that count alike; more makes those that are nearer count for more,
      as if there were more of them. Their sum of counts stays, and the counts have no gradient.

  Returns:
    [n] float32 nats, 0 where a pair is not real.

  Source: van den Oord et al., arXiv 1807.03748, equation 4; both directions: Radford et al., arXiv
    2103.00020, figure 3; hardness: Robinson et al., arXiv 2010.04592, equation 4.
  """
  forth = _find(mine.left, every.right, every.real, places, scale, hardness)
  back = _find(mine.right, every.left, every.real, places, scale, hardness)
  return jnp.where(mine.real, (forth + back) / 2, 0.0)


def _find(asked, answers, real, places, scale, hardness):
  similarity = jnp.einsum('nk,mk->nm', asked, answers, preferred_element_type=jnp.float32)
  logits = jnp.where(real, similarity * scale, MASKED)
  own = jnp.arange(answers.shape[0]) == places[:, None]
  picked = jnp.sum(jnp.where(own, logits, 0.0), axis=-1)
  if hardness:
    others = real & ~own
    share = jax.nn.softmax(jnp.where(others, hardness * similarity, MASKED), axis=-1)
    counts = share * jnp.sum(others, axis=-1, keepdims=True)
    # The smallest normal number: a negative that counts for nothing must not become −inf, whose
    # gradient is not a number.
    extra = jax.lax.stop_gradient(jnp.log(jnp.maximum(counts, 1e-37)))
    logits += jnp.where(others, extra, 0.0)
  return jax.nn.logsumexp(logits, axis=-1) - picked


def sigmoid_pairs(
  mine: Pairs,
  every: Pairs,
  places: jax.Array,
  scale: jax.Array,
  offset: jax.Array,
  hardness: float,
) -> jax.Array:
  """Logistic loss of saying of every pair of vectors whether they belong together.

  Args:
    mine: n pairs.
    every: all N pairs, mine among them.
    places: [n] int32 where mine are in all.
    scale: [] float32 factor on the similarities.
    offset: [] float32 added to them.
    hardness: as of `info_nce`.

  Returns:
    [n] float32 nats: sums over all partners, 0 where a pair is not real.

  Source: Zhai et al., arXiv 2303.15343, equation 2.
  """
  similarity = jnp.einsum('nk,mk->nm', mine.left, every.right, preferred_element_type=jnp.float32)
  own = jnp.arange(every.left.shape[0]) == places[:, None]
  losses = -jax.nn.log_sigmoid(jnp.where(own, 1.0, -1.0) * (similarity * scale + offset))
  if hardness:
    others = every.real & ~own
    share = jax.nn.softmax(jnp.where(others, hardness * similarity, MASKED), axis=-1)
    counts = share * jnp.sum(others, axis=-1, keepdims=True)
    losses *= jax.lax.stop_gradient(jnp.where(others, counts, 1.0))
  total = jnp.sum(jnp.where(every.real, losses, 0.0), axis=-1)
  return jnp.where(mine.real, total, 0.0)
