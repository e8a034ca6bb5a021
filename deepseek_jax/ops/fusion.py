"""Attention to several modalities, each by itself, summed with weights that a question makes."""

import jax
import jax.numpy as jnp

from deepseek_jax.ops.attention.reference import MASKED, attend


def modality_weights(
  query: jax.Array, key: jax.Array, mask: jax.Array, modality: jax.Array, count: int
) -> jax.Array:
  """Returns how much each modality counts for each token.

  A modality's score is the mean score of its keys, which is that of its mean key; the softmax is
  over those modalities alone that a token sees any key of.

  Args:
    query: [B, T, K] float32 mean of the text up to each token, projected.
    key: [B, S, K] float32.
    mask: [B, T, S] bool, which keys a token sees.
    modality: [B, S] int32 from 0 to `count`.
    count: number of modalities M.

  Returns:
    [B, T, M] float32; 0 for a modality that is not there, whose sum is 1 where any is.
  """
  scores = jnp.einsum('btk,bsk->bts', query, key) * query.shape[-1] ** -0.5
  own = (modality[..., None] == jnp.arange(count)).astype(jnp.float32)
  seen = jnp.einsum('bts,bsm->btm', mask.astype(jnp.float32), own)
  total = jnp.einsum('bts,bsm->btm', jnp.where(mask, scores, 0.0), own)
  there = seen > 0
  mean = jnp.where(there, total / jnp.maximum(seen, 1.0), MASKED)
  # Where nothing is there, the softmax of nothing is evenly spread: it must count for nothing.
  return jax.nn.softmax(mean, axis=-1) * there


def attend_fused(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  modality: jax.Array,
  weights: jax.Array,
) -> jax.Array:
  """Sums the attention to each modality, weighed; one product with the values for all of them.

  Args:
    query: [B, T, H, K].
    key: [B, S, H, K].
    value: [B, S, H, V].
    mask: [B, T, S] bool, which keys a token sees.
    modality: [B, S] int32 from 0 to M.
    weights: [B, T, M] float32.

  Returns:
    [B, T, H, V] in the dtype of `value`; scores and softmax are float32.
  """
  scores = jnp.einsum('bthk,bshk->bhts', query, key, preferred_element_type=jnp.float32)
  scores *= query.shape[-1] ** -0.5
  parts = jnp.zeros_like(scores)
  for number in range(weights.shape[-1]):
    own = (mask & (modality[:, None] == number))[:, None]
    part = jax.nn.softmax(jnp.where(own, scores, MASKED), axis=-1)
    parts += jnp.where(own, part, 0.0) * weights[:, None, :, number, None]
  return jnp.einsum('bhts,bshv->bthv', parts.astype(value.dtype), value)


def attend_fused_reference(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  modality: jax.Array,
  weights: jax.Array,
) -> jax.Array:
  """Slow and obvious twin of `attend_fused`: [B, T, H, V], one attention a modality."""
  total = jnp.zeros((*query.shape[:3], value.shape[-1]), jnp.float32)
  for number in range(weights.shape[-1]):
    own = mask & (modality[:, None] == number)
    mixed = attend(query, key, value, own, scale=query.shape[-1] ** -0.5)
    there = jnp.any(own, axis=-1)[..., None, None]
    total += jnp.where(there, mixed, 0.0) * weights[:, :, number, None, None]
  return total.astype(value.dtype)
