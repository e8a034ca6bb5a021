"""From tokens to logits of experts: the part that most routers share."""

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

  float32 from here to the weights of the choices: near-ties between experts must fall the same way
  in every precision and layout.

  Args:
    module: the router.
    x: [B, T, D].
    experts: number of experts E.
    noise: kind of noise, or None.
    limits: experts that are not allowed get a logit that stands for nothing.

  Returns:
    Logits [N, E] float32, and the logits that decide, which may be disturbed.
  """
  tokens = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  key = noise_key(module, noise)
  if noise is not None and key is not None:
    tokens = noise.disturb_input(tokens, key)
  w = weight(module, 'weight', (x.shape[-1], experts), ('embed', None), dtype=jnp.float32)
  logits = rule_out(jnp.einsum('nd,de->ne', tokens, w), limits.allowed)
  if noise is None or key is None:
    return logits, logits
  return logits, noise.disturb_logits(logits, key)
