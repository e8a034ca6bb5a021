"""What routers and dispatches offer; any object that does fits in `MoE`."""

from typing import Protocol, runtime_checkable

import flax.linen as nn
import jax
from flax import struct

from deepseek_jax.layers.context import Context
from deepseek_jax.ops.experts import ExpertWeights


@struct.dataclass
class Assignment:
  """Which experts each of N tokens goes to.

  Attributes:
    experts: [N, K] int32.
    weights: [N, K] float32 factors on the experts' outputs.
    scores: [N, E] float32 affinities that balance losses are made of.
  """

  experts: jax.Array
  weights: jax.Array
  scores: jax.Array


@runtime_checkable
class RouterConfig(Protocol):
  """The config of a router kind."""

  def check(self, experts: int, top_k: int) -> list[str]:
    """Returns what is wrong with routing to `top_k` of `experts` experts, as messages."""

  def build(self, experts: int, top_k: int, name: str | None = None) -> nn.Module:
    """Returns a module `(x [B, T, D], context) -> Assignment` with N = B·T."""


@runtime_checkable
class Dispatch(Protocol):
  """How tokens reach their experts."""

  def __call__(
    self, x: jax.Array, assignment: Assignment, matrices: ExpertWeights, context: Context
  ) -> jax.Array:
    """Returns Σ_k weight_k · expert_k(x) for tokens `x` [N, D]."""
