"""Choosing experts: group-limited top-k, loads and balance statistics."""

import einops
import jax
import jax.numpy as jnp


def group_limited_top_k(
  scores: jax.Array, selection: jax.Array, *, groups: int, kept_groups: int, top_k: int
) -> tuple[jax.Array, jax.Array]:
  """Picks `top_k` experts a token from the `kept_groups` best groups of experts.

  A group's score is the sum of its two largest selection scores. Groups that are dropped are
  masked with −inf, not with 0: a biased selection score may be negative.

  Args:
    scores: [N, E] float32 affinities; what the weights are taken from.
    selection: [N, E] float32 scores that decide (affinities plus bias).
    groups: number of equal groups of neighbouring experts.
    kept_groups: groups a token may choose from.
    top_k: experts a token goes to.

  Returns:
    experts [N, K] int32, best first, and the scores [N, K] float32 of those experts.

  Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2 (node-limited routing).
  """
  if groups > 1:
    grouped = einops.rearrange(selection, 'n (g e) -> n g e', g=groups)
    best = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0]
    kept = jax.lax.top_k(jnp.sum(best, axis=-1), kept_groups)[1]
    allowed = jnp.any(kept[:, :, None] == jnp.arange(groups), axis=1)
    selection = einops.rearrange(
      jnp.where(allowed[:, :, None], grouped, -jnp.inf), 'n g e -> n (g e)'
    )
  experts = jax.lax.top_k(jax.lax.stop_gradient(selection), top_k)[1]
  return experts, jnp.take_along_axis(scores, experts, axis=-1)


def chosen_mask(experts: jax.Array, count: int) -> jax.Array:
  """Turns chosen experts [N, K] into a float32 table [N, E] of zeros and ones."""
  return jnp.sum(jax.nn.one_hot(experts, count, dtype=jnp.float32), axis=1)


def expert_load(experts: jax.Array, real: jax.Array, count: int) -> jax.Array:
  """Counts the tokens that chose each expert.

  Args:
    experts: [N, K] int32.
    real: [N] bool; padding counts for nothing.
    count: number of experts E.

  Returns:
    [E] float32 counts; they sum to K × number of real tokens.
  """
  return jnp.einsum('ne,n->e', chosen_mask(experts, count), real.astype(jnp.float32))


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
