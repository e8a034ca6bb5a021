"""From tokens to logits of experts: the part that most routers share."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.layers.moe.interface import Limits
from deepseek_jax.layers.moe.router.noise import Noise, noise_key
from deepseek_jax.layers.weights import weight
from deepseek_jax.ops.routing import rule_out


def expert_logits(
  module: nn.Module, x: jax.Array, experts: int, noise: Noise | None, limits: Limits
) -> tuple[jax.Array, jax.Array]:
  """Multiplies every token with one learnt vector an expert, `weight` [D, E] in `module`.

  Arguments and results are those of `limited_logits`; `x` is [B, T, D].
  """

  def multiply(x: jax.Array) -> jax.Array:
    w = weight(module, 'weight', (x.shape[-1], experts), ('embed', 'routed'), dtype=jnp.float32)
    return jnp.einsum('btd,de->bte', x, w)

  return limited_logits(module, x, noise, limits, multiply)


def limited_logits(
  module: nn.Module,
  x: jax.Array,
  noise: Noise | None,
  limits: Limits,
  compare: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """Compares tokens with experts, under noise and limits.

  float32 from here to the weights of the choices: near-ties between experts must fall the same way
  in every precision and layout.

  Args:
    module: the router.
    x: [B, T, D].
    noise: kind of noise, or None.
    limits: experts that are not allowed get a logit that stands for nothing.
    compare: makes logits [B, T, E] of tokens [B, T, D], both float32.

  Returns:
    Logits [N, E] float32, and the logits that decide, which may be disturbed.
  """
  x, key = x.astype(jnp.float32), noise_key(module, noise)
  if noise is None or key is None:
    logits = _flat(compare(x), limits)
    return logits, logits
  logits = _flat(compare(noise.disturb_input(x, key)), limits)
  return logits, noise.disturb_logits(logits, key)


def _flat(logits: jax.Array, limits: Limits) -> jax.Array:
  """[B, T, E] -> [N, E]."""
  return rule_out(logits.reshape(-1, logits.shape[-1]), limits.allowed)
