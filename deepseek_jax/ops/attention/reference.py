"""Masks, and plain softmax attention that holds every score: the reference of all kinds."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e30
"""Score of a pair that may not attend. Finite, so that a row without any visible key (padding)
gives finite numbers and finite gradients."""


class Seen(NamedTuple):
  """Who sees whom, by positions and segments: a mask of [B, T, S] without its memory.

  `visible(*seen)` is its meaning. Where all positions are 0, order does not count and every query
  sees all keys of its segment.

  Attributes:
    query_positions: [B, T] int32.
    key_positions: [B, S] int32; negative marks an empty slot of a cache, which nobody sees.
    query_segments: [B, T] int32 packed document of each query, or None where rows are not packed.
    key_segments: [B, S] int32, or None; both or neither.
  """

  query_positions: jax.Array
  key_positions: jax.Array
  query_segments: jax.Array | None = None
  key_segments: jax.Array | None = None

  def map(
    self,
    queries: Callable[[jax.Array], jax.Array],
    keys: Callable[[jax.Array], jax.Array],
  ) -> 'Seen':
    """Returns it with functions applied to what it says of queries [B, T] and of keys [B, S]."""
    return Seen(
      queries(self.query_positions),
      keys(self.key_positions),
      None if self.query_segments is None else queries(self.query_segments),
      None if self.key_segments is None else keys(self.key_segments),
    )

  def at(self, rows: jax.Array | slice) -> 'Seen':
    """Keeps some of the queries; a slice, or [n] int32."""
    return self.map(lambda x: jnp.asarray(x)[:, rows], lambda x: x)


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


def attend_seen(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  seen: Seen,
  *,
  scale: float,
  key_bias: jax.Array | None = None,
  sinks: jax.Array | None = None,
  window: tuple[int, int] | None = None,
) -> jax.Array:
  """Softmax attention of H query heads to G heads of keys and values, all of it in float32.

  Slow and obvious: the twin of every fast form.

  Args:
    query: [B, T, H, K].
    key: [B, S, G, K]; G divides H, and query head h has the keys of head h // (H / G).
    value: [B, S, G, V].
    seen: which key each query may see.
    scale: factor on the scores.
    key_bias: [B, S] float32 added to every score of a key, or None.
    sinks: [H] float32 logit of each head that takes part in the softmax without a value, or None.
    window: (size, n): a query sees the last `size` positions up to its own and the positions below
      n; None for no window.

  Returns:
    [B, T, H, V] in the dtype of `value`; zero where a query sees no key.

  Source: Vaswani et al., arXiv 1706.03762, equation 1; groups: Ainslie et al., arXiv 2305.13245;
    sinks in the denominator: OpenAI, gpt-oss, arXiv 2508.10925.
  """
  mask = visible(*seen)
  if window is not None:
    mask &= window_mask(seen.query_positions, seen.key_positions, *window)
  heads, groups = query.shape[2], key.shape[2]
  q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
  k, v = (jnp.repeat(x, heads // groups, axis=2) for x in (k, v))
  scores = jnp.einsum('bthk,bshk->bhts', q, k) * scale
  if key_bias is not None:
    scores += key_bias[:, None, None, :]
  scores = jnp.where(mask[:, None], scores, MASKED)
  top = jnp.max(scores, axis=-1, keepdims=True)
  if sinks is not None:
    top = jnp.maximum(top, sinks[:, None, None])
  top = jax.lax.stop_gradient(top)
  weights = jnp.where(mask[:, None], jnp.exp(scores - top), 0.0)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  if sinks is not None:
    total += jnp.exp(sinks[:, None, None] - top)
  weights /= jnp.where(total > 0, total, 1.0)
  return jnp.einsum('bhts,bshv->bthv', weights, v).astype(value.dtype)


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
