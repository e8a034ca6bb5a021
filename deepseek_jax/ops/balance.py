"""Losses that even out the load of experts, as functions of arrays."""

import jax
import jax.numpy as jnp

from deepseek_jax.ops.routing import chosen_mask


def sequence_balance(scores: jax.Array, real: jax.Array, top_k: int) -> jax.Array:
  """Balance loss of each sequence alone, summed over sequences.

  f_i = E / (K T) · (tokens whose top K raw scores include expert i), P_i = mean over tokens of the
  score of i divided by the token's sum; the loss of a sequence is Σ f_i P_i, which is 1 when the
  load is even.

  Args:
    scores: [B, T, E] float32 affinities without bias.
    real: [B, T] bool; padding counts for nothing.
    top_k: experts a token goes to.

  Returns:
    Scalar float32, the sum over the B sequences. Gradients flow through P only.

  Source: DeepSeek-V3, arXiv 2412.19437, equations 17 to 20.
  """
  frequency, probability = _balance_sums(scores, real, top_k)
  tokens = jnp.maximum(jnp.sum(real, axis=1, dtype=jnp.float32), 1.0)[:, None]
  experts = scores.shape[-1]
  share = frequency * experts / (top_k * tokens)
  return jnp.sum(share * probability / tokens)


def batch_balance(scores: jax.Array, real: jax.Array, top_k: int) -> jax.Array:
  """Balance loss over all tokens of the (global) batch at once, times the number of sequences.

  Sequences may specialise as long as the batch is even. The factor B makes it a sum over
  sequences like every other loss of a layer.

  Args:
    scores: [B, T, E] float32 affinities without bias.
    real: [B, T] bool.
    top_k: experts a token goes to.

  Returns:
    Scalar float32. Gradients flow through the mean scores only.

  Source: Qiu et al., "Demons in the Detail", arXiv 2501.11873, equation 4.
  """
  frequency, probability = _balance_sums(scores, real, top_k)
  tokens = jnp.maximum(jnp.sum(real, dtype=jnp.float32), 1.0)
  experts = scores.shape[-1]
  share = jnp.sum(frequency, axis=0) * experts / (top_k * tokens)
  return scores.shape[0] * jnp.sum(share * jnp.sum(probability, axis=0) / tokens)


def _balance_sums(scores: jax.Array, real: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
  """Per-sequence counts of raw top-k choices and sums of normalised scores, both [B, E]."""
  batch, length, experts = scores.shape
  weight = real.astype(jnp.float32)
  raw = jax.lax.top_k(jax.lax.stop_gradient(scores), top_k)[1]
  chosen = chosen_mask(raw.reshape(batch * length, top_k), experts)
  frequency = jnp.einsum('bte,bt->be', chosen.reshape(batch, length, experts), weight)
  normalised = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
  return frequency, jnp.einsum('bte,bt->be', normalised, weight)


def z_loss(logits: jax.Array, real: jax.Array) -> jax.Array:
  """Mean square of log Σ exp(logits) over the tokens of each sequence, summed over sequences.

  Args:
    logits: [B, T, E] float32.
    real: [B, T] bool; padding counts for nothing.

  Returns:
    Scalar float32.

  Source: Zoph et al. (ST-MoE), arXiv 2202.08906, equation 5.
  """
  square = jnp.square(jax.nn.logsumexp(logits, axis=-1))
  tokens = jnp.maximum(jnp.sum(real, axis=1, dtype=jnp.float32), 1.0)
  return jnp.sum(jnp.sum(jnp.where(real, square, 0.0), axis=1) / tokens)
