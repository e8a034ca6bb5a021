"""Dispatch without communication of its own."""

import dataclasses
from collections.abc import Mapping

import jax

from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe.interface import Assignment
from deepseek_jax.ops.experts import ExpertWeights, apply_experts
from deepseek_jax.sharding.rules import Rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
  """Sorts tokens by expert and multiplies group by group; drops none.

  Where the experts' weights are sharded, the compiler moves what is needed.
  """

  def check(self, experts: int, sizes: Mapping[str, int], rules: Rules) -> list[str]:
    """Returns nothing: it runs on any mesh."""
    return []

  def __call__(
    self, x: jax.Array, assignment: Assignment, matrices: ExpertWeights, context: Context
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns Σ_k weight_k · expert_k(x) for tokens `x` [N, D]; there is nothing to log."""
    return apply_experts(x, assignment.experts, assignment.weights, matrices), {}
