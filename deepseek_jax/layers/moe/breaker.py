"""A breaker in a layer of experts: one that breaks is routed around, and tried again later."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.weights import buffer
from deepseek_jax.ops.breaker import OPEN, finite_experts, watch_matrices
from deepseek_jax.ops.experts import ExpertWeights

STATE, SINCE = 'breaker', 'breaker_since'
"""Names of the buffers, [E] each: state of every expert, and finished steps when it began."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Breaker:
  """Takes experts that are not finite out of use, and puts them back as copies of healthy ones.

  Weights that are not finite are seen before they are used: the expert is left out of that very
  forward pass, and no step is lost. An output that is not finite though input and weights are, or
  a gradient that is not though what came back to the layer was, costs one step, which the guard
  skips; the next is routed around the expert. What goes wrong elsewhere opens nobody.

  An open expert is not chosen, and its tokens go to the others, whose weights are renormalised.
  After `cooldown` steps it is made anew from the next healthy expert of its layer (matrices, what
  the router knows it by, selection bias; noise on each array; the optimizer's memory of it zero)
  and is on trial: `trial` steps without a fault, and it is closed; a fault, and it cools down again
  for as long. Where no expert of a layer is left, the run stops.

  A call with one token a row (decoding) goes by the state alone: looking at every weight would take
  longer than the token.

  Attributes:
    cooldown: steps out of use.
    trial: steps on trial.
    noise: standard deviation of the noise on a copy, as a share of that of each array.
  """

  cooldown: int = 50
  trial: int = 20
  noise: float = 0.05

  def __post_init__(self):
    errors = [
      f'`{name}` is {getattr(self, name)}; expected 1 or more steps'
      for name in ('cooldown', 'trial')
      if getattr(self, name) < 1
    ]
    if self.noise < 0:
      errors.append(f'`noise` is {self.noise}; expected 0 or more')
    if errors:
      raise ConfigError(errors)

  def inspect(
    self, module: nn.Module, matrices: ExpertWeights, decoding: bool
  ) -> tuple[ExpertWeights, jax.Array, jax.Array, jax.Array]:
    """Declares the buffers in `module` and looks at the weights.

    Args:
      module: the layer.
      matrices: [E, ·, ·] each.
      decoding: whether to go by the state alone.

    Returns:
      The matrices, zero where an expert's are not finite; which experts may be chosen [E] bool;
      which have weights that are not finite [E] bool; and a signal [] for `watch_output`.
    """
    count = matrices.gate.shape[0]
    state = buffer(module, STATE, (count,), (None,))
    buffer(module, SINCE, (count,), (None,))
    usable = state != OPEN
    if decoding:
      return matrices, usable, jnp.zeros(count, bool), jnp.float32(0)
    finite = finite_experts(jax.lax.stop_gradient(tuple(matrices)))
    matrices = matrices.of(*(jnp.where(finite[:, None, None], w, 0) for w in matrices))
    watched, signal = watch_matrices(tuple(matrices), state)
    return matrices.of(*watched), usable & finite, ~finite, signal
