"""Masks, and plain softmax attention that holds every score: the reference of all kinds."""

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e30
"""Score of a pair that may not attend. Finite, so that a row without any visible key (padding)
gives finite numbers and finite gradients."""


def visible(
  query_positions: jax.Array,
  key_positions: jax.Array,
  query_segments: jax.Array | None = None,
  key_segments: jax.Array | None = None,
) -> jax.Array:
  """Says which key each query may see: none after it, and none of another packed document.

  Args:
    query_positions: [B, T] int32.
    key_positions: [B, S] int32; negative marks an empty slot of a cache.
    query_segments: [B, T] int32, or None where rows are not packed.
    key_segments: [B, S] int32.

  Returns:
    [B, T, S] bool.
  """
  query, key = query_positions[:, :, None], key_positions[:, None, :]
  mask = (key <= query) & (key >= 0)
  if query_segments is not None and key_segments is not None:
    mask &= query_segments[:, :, None] == key_segments[:, None, :]
  return mask


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  *,
  scale: float,
  bias: jax.Array | None = None,
) -> jax.Array:
  """Softmax attention, every head with keys and values of its own.

  Args:
    query: [B, T, H, K].
    key: [B, S, H, K].
    value: [B, S, H, V].
    mask: [B, T, S] bool, True where a query may see a key.
    scale: factor on the scores.
    bias: [B, T, S] float32 added to the scores of every head.

  Returns:
    [B, T, H, V] in the dtype of `value`. Scores and softmax are float32: rounding a score is an
    error in the exponent of its weight.

  Source: Vaswani et al., arXiv 1706.03762, equation 1.
  """
  scores = jnp.einsum('bthk,bshk->bhts', query, key, preferred_element_type=jnp.float32)
  weights = _softmax(scores * scale, mask, bias).astype(value.dtype)
  return jnp.einsum('bhts,bshv->bthv', weights, value)


def attend_latent(
  query_latent: jax.Array,
  query_rope: jax.Array,
  latent: jax.Array,
  key_rope: jax.Array,
  mask: jax.Array,
  *,
  scale: float,
  bias: jax.Array | None = None,
) -> jax.Array:
  """Attention of every head over one shared latent per token (absorbed MLA).

  Args:
    query_latent: [B, T, H, C] queries carried into the latent space.
    query_rope: [B, T, H, R] rotated part of the queries.
    latent: [B, S, C], both key and value.
    key_rope: [B, S, R] rotated key that all heads share.
    mask: [B, T, S] bool.
    scale: factor on the scores.
    bias: [B, T, S] float32 added to the scores of every head.

  Returns:
    [B, T, H, C] in the dtype of `latent`; scores and softmax are float32.

  Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C.
  """
  scores = jnp.einsum('bthc,bsc->bhts', query_latent, latent, preferred_element_type=jnp.float32)
  scores += jnp.einsum('bthr,bsr->bhts', query_rope, key_rope, preferred_element_type=jnp.float32)
  weights = _softmax(scores * scale, mask, bias).astype(latent.dtype)
  return jnp.einsum('bhts,bsc->bthc', weights, latent)


def _softmax(scores: jax.Array, mask: jax.Array, bias: jax.Array | None) -> jax.Array:
  if bias is not None:
    scores += bias[:, None]
  return jax.nn.softmax(jnp.where(mask[:, None], scores, MASKED), axis=-1)


def window_mask(
  query_positions: jax.Array, key_positions: jax.Array, size: int, sinks: int
) -> jax.Array:
  """Keeps the last `size` positions up to the query, and the first `sinks` of the segment.

  Args:
    query_positions: [B, T] int32.
    key_positions: [B, S] int32.
    size: positions in the window, the query's own among them.
    sinks: positions at the start that stay visible.

  Returns:
    [B, T, S] bool; causality is not in it.

  Source: sinks: Xiao et al., arXiv 2309.17453.
  """
  query, key = query_positions[:, :, None], key_positions[:, None, :]
  return (query - key < size) | (key < sinks)


def kept_counts(keep: float, length: int) -> np.ndarray:
  """Returns how many of n = 0 … `length` visible keys are kept, [length + 1] int32, at least 1.

  A table made on the host: 50 × 0.3 rounded to float32 is above 15, and its ceiling 16.
  """
  # Less than a hair, since in float64 too a share that should be whole may end just above.
  counts = np.ceil(np.arange(length + 1) * keep * (1 - 1e-12))
  return np.maximum(counts, 1).astype(np.int32)


def keep_highest(scores: jax.Array, mask: jax.Array, keep: float) -> jax.Array:
  """Keeps, for each query, the share `keep` of its visible keys with the highest scores.

  Args:
    scores: [B, S] float32, one score a key.
    mask: [B, T, S] bool, the keys each query sees.
    keep: share in (0, 1]; at least one key stays.

  Returns:
    [B, T, S] bool. Keys that tie with the last one kept are kept too.
  """
  counts = jnp.sum(mask, axis=-1, dtype=jnp.int32)
  kept = jnp.asarray(kept_counts(keep, mask.shape[-1]))[counts]
  ranked = jnp.sort(jnp.where(mask, scores[:, None, :], MASKED), axis=-1, descending=True)
  threshold = jnp.take_along_axis(ranked, kept[..., None] - 1, axis=-1)
  return mask & (scores[:, None, :] >= threshold)
