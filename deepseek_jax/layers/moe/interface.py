"""What routers, balance losses and dispatches offer; any object that does fits in `MoE`."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
from flax import struct

from deepseek_jax.layers.context import Context
from deepseek_jax.ops.experts import ExpertWeights
from deepseek_jax.sharding.rules import Rules


@struct.dataclass
class Assignment:
  """Which experts each of N tokens goes to.

  Attributes:
    experts: [N, K] int32, from 0 to E; E is nobody: that choice reaches no expert and costs none.
    weights: [N, K] float32 factors on the experts' outputs; 0 where the choice is nobody.
    scores: [N, E] float32 affinities that balance losses are made of.
    logits: [N, E] float32, what the scores were made of; None where there is no such thing.
    cache: what a router that remembers keeps of each row [B, …]; None where none was given.
  """

  experts: jax.Array
  weights: jax.Array
  scores: jax.Array
  logits: jax.Array | None = None
  cache: Any = None


@struct.dataclass
class Limits:
  """What a router may choose from, at this step.

  Attributes:
    allowed: [E] bool, experts that may be chosen; None is all of them.
    top_k: [] int32, choices a token has, up to K: the others are nobody; None is K.
  """

  allowed: jax.Array | None = None
  top_k: jax.Array | None = None


@runtime_checkable
class RouterConfig(Protocol):
  """The config of a router kind."""

  def check(self, experts: int, top_k: int) -> list[str]:
    """Returns what is wrong with routing to `top_k` of `experts` experts, as messages."""

  def build(self, experts: int, top_k: int, name: str | None = None) -> nn.Module:
    """Returns a module `(x [B, T, D], context, limits=None) -> Assignment` with N = B·T.

    Limits are given only where the layer has any (`MoE.breaker`, `MoE.growth`). In generation, a
    router that is `Remembering` is given a `cache` too, and returns it in the assignment.
    """


@runtime_checkable
class Balance(Protocol):
  """An auxiliary loss that evens out the load of experts."""

  def check(self, experts: int) -> list[str]:
    """Returns what is wrong with balancing `experts` experts, as messages."""

  def __call__(self, scores: jax.Array, experts: jax.Array, real: jax.Array) -> jax.Array:
    """Returns the weighted loss [], summed over sequences.

    Args:
      scores: [B, T, E] float32 affinities.
      experts: [B, T, K] int32 choices; E is nobody.
      real: [B, T] bool; padding counts for nothing.
    """


@runtime_checkable
class Dispatch(Protocol):
  """How tokens reach their experts."""

  def check(self, experts: int, sizes: Mapping[str, int], rules: Rules) -> list[str]:
    """Returns what is wrong with `experts` experts on a mesh of these sizes, as messages."""

  def __call__(
    self, x: jax.Array, assignment: Assignment, matrices: ExpertWeights, context: Context
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns Σ_k weight_k · expert_k(x) for tokens `x` [N, D], and what there is to log.

    What is logged are sums over tokens. A kind that may drop logs `choices` [] of real tokens and
    `dropped` [], those of them that reached no expert for want of room.
    """
