"""Losses that even out the load of experts, as functions of arrays."""

import jax
import jax.numpy as jnp

from deepseek_jax.ops.routing import expert_load


def sequence_balance(scores: jax.Array, experts: jax.Array, real: jax.Array) -> jax.Array:
  """Balance loss of each sequence alone, summed over sequences.

  f_i = E / (K T) · (tokens whose top K raw scores include expert i), P_i = mean over tokens of the
  score of i divided by the token's sum; the loss of a sequence is Σ f_i P_i, which is 1 when the
  load is even. Where a token has fewer choices than K, the mean of its choices stands for K.

  Args:
    scores: [B, T, E] float32 affinities without bias.
    experts: [B, T, K] int32 choices; here only whose choice is nobody's (E) matters.
    real: [B, T] bool; padding counts for nothing.

  Returns:
    Scalar float32, the sum over the B sequences. Gradients flow through P only.

  Source: DeepSeek-V3, arXiv 2412.19437, equations 17 to 20.
  """
  share, tokens = _shares(raw_choices(scores, experts), real, scores.shape[-1])
  return jnp.sum(share * _probability_sums(scores, real) / tokens)


def batch_balance(scores: jax.Array, experts: jax.Array, real: jax.Array) -> jax.Array:
  """Balance loss over all tokens of the (global) batch at once, times the number of sequences.

  Sequences may specialise as long as the batch is even. The factor B makes it a sum over
  sequences like every other loss of a layer. Arguments are those of `sequence_balance`, scores
  [B, T, E].

  Source: Qiu et al., "Demons in the Detail", arXiv 2501.11873, equation 4.
  """
  count = scores.shape[-1]
  chosen = _counts(raw_choices(scores, experts), real, count)
  total = jnp.sum(chosen, axis=0)
  share = total * count / jnp.maximum(jnp.sum(total), 1.0)
  tokens = jnp.maximum(jnp.sum(real, dtype=jnp.float32), 1.0)
  probability = jnp.sum(_probability_sums(scores, real), axis=0)
  return scores.shape[0] * jnp.sum(share * probability / tokens)


def expert_balance(scores: jax.Array, experts: jax.Array, real: jax.Array) -> jax.Array:
  """Balance loss of each sequence's true choices, summed over sequences.

  f_i = E / (K T) · (tokens that chose expert i) and P_i as in `sequence_balance`: groups and a
  bias have their say in f.

  Args:
    scores: [B, T, E] float32 affinities without bias.
    experts: [B, T, K] int32 choices; E is nobody.
    real: [B, T] bool; padding counts for nothing.

  Returns:
    Scalar float32, the sum over the B sequences of Σ f_i P_i. Gradients flow through P only.

  Source: DeepSeekMoE, arXiv 2401.06066, equations 12 to 14; DeepSeek-V2, arXiv 2405.04434,
    equations 23 to 25.
  """
  share, tokens = _shares(experts, real, scores.shape[-1])
  return jnp.sum(share * _probability_sums(scores, real) / tokens)


def device_balance(
  scores: jax.Array, experts: jax.Array, real: jax.Array, devices: int
) -> jax.Array:
  """As `expert_balance`, for groups of neighbouring experts that share a device.

  The frequency of a device is the mean of its experts', its probability their sum: Σ f'_d P'_d.

  Args:
    scores: [B, T, E] float32 affinities without bias.
    experts: [B, T, K] int32 choices; E is nobody.
    real: [B, T] bool.
    devices: number of devices; it divides E.

  Source: DeepSeekMoE, arXiv 2401.06066, equations 15 to 17; DeepSeek-V2, arXiv 2405.04434,
    equations 26 to 28.
  """
  share, tokens = _shares(experts, real, scores.shape[-1])
  probability = _by_device(_probability_sums(scores, real) / tokens, devices)
  return jnp.sum(jnp.mean(_by_device(share, devices), -1) * jnp.sum(probability, -1))


def communication_balance(
  scores: jax.Array, experts: jax.Array, real: jax.Array, devices: int, kept: int
) -> jax.Array:
  """Balance loss of what devices are sent: a token is sent once to each device that it chose.

  f''_d = D / (M T) · (tokens sent to device d), P''_d = sum of its experts' P; Σ f''_d P''_d.

  Args:
    scores: [B, T, E] float32 affinities without bias.
    experts: [B, T, K] int32 choices; E is nobody.
    real: [B, T] bool.
    devices: number of devices D; it divides E.
    kept: devices M that a token is sent to at most.

  Source: DeepSeek-V2, arXiv 2405.04434, equations 29 to 31.
  """
  count = scores.shape[-1]
  device = experts // (count // devices)
  sent = jnp.any(device[..., None] == jnp.arange(devices), axis=2)
  tokens = jnp.maximum(jnp.sum(real, axis=1, dtype=jnp.float32), 1.0)[:, None]
  frequency = jnp.sum(sent & real[..., None], axis=1) * (devices / (kept * tokens))
  probability = _by_device(_probability_sums(scores, real) / tokens, devices)
  return jnp.sum(frequency * jnp.sum(probability, axis=-1))


def raw_choices(scores: jax.Array, experts: jax.Array) -> jax.Array:
  """The choices [B, T, K] that the scores [B, T, E] alone would make; what is nobody's stays so."""
  raw = jax.lax.top_k(jax.lax.stop_gradient(scores), experts.shape[-1])[1]
  return jnp.where(experts == scores.shape[-1], experts, raw)


def _counts(experts: jax.Array, real: jax.Array, count: int) -> jax.Array:
  """How many tokens of each sequence chose each expert, [B, E]."""
  return jax.vmap(lambda chosen, here: expert_load(chosen, here, count))(experts, real)


def _shares(experts: jax.Array, real: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Load of each expert in each sequence over the even one [B, E]; and tokens [B, 1]."""
  chosen = _counts(experts, real, count)
  total = jnp.maximum(jnp.sum(chosen, axis=-1, keepdims=True), 1.0)
  tokens = jnp.maximum(jnp.sum(real, axis=1, dtype=jnp.float32), 1.0)[:, None]
  return chosen * count / total, tokens


def _probability_sums(scores: jax.Array, real: jax.Array) -> jax.Array:
  """Sums over the tokens of each sequence of scores that sum to 1 a token, [B, E]."""
  normalised = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
  return jnp.einsum('bte,bt->be', normalised, real.astype(jnp.float32))


def _by_device(x: jax.Array, devices: int) -> jax.Array:
  """[B, E] -> [B, devices, E / devices]."""
  return x.reshape(x.shape[0], devices, -1)


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
