"""Dispatch that leaves tokens where they are."""

import dataclasses
from collections.abc import Mapping

import jax

from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe.dispatch import shards
from deepseek_jax.layers.moe.dispatch.shards import Facts
from deepseek_jax.layers.moe.interface import Assignment
from deepseek_jax.ops.experts import ExpertWeights
from deepseek_jax.sharding.rules import Rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
  """Every shard runs all experts for its own tokens, and drops none.

  Where the experts' weights are sharded they come to the tokens, as dense weights do: of a layer
  that is being run, each device then holds the matrices of all experts (over its own hidden units,
  where those are shared). Where that is too much, `AllToAll` sends the tokens instead.
  """

  def check(self, experts: int, sizes: Mapping[str, int], rules: Rules) -> list[str]:
    """Returns nothing: it runs on any mesh."""
    return []

  def __call__(
    self, x: jax.Array, assignment: Assignment, matrices: ExpertWeights, context: Context
  ) -> tuple[jax.Array, Facts]:
    """Returns Σ_k weight_k · expert_k(x) for tokens `x` [N, D]; there is nothing to log."""
    return shards.run(None, x, assignment, matrices, context)
