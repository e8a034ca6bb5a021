"""Dispatch of few tokens: every shard sees all, and runs its own experts."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe.dispatch import shards
from deepseek_jax.layers.moe.dispatch.shards import AXIS, Experts, Facts, Part
from deepseek_jax.layers.moe.interface import Assignment
from deepseek_jax.ops.experts import ExpertWeights
from deepseek_jax.sharding.rules import Rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllGather:
  """Shows all tokens of the mesh axis `expert` to each of its shards, and sums what they say.

  For decoding, where tokens are few and what counts is the number of messages: there are two, of
  known size, where `AllToAll` has three that depend on the router. Each shard takes in P times its
  own n tokens and gives out as many results, whatever K is: with K well above P, it is the better
  one in training too.

  Needs rules by which experts lie on the mesh axis `expert`: the preset EXPERT.
  """

  def check(self, experts: int, sizes: Mapping[str, int], rules: Rules) -> list[str]:
    """Returns what is wrong with `experts` experts on a mesh of these sizes, as messages."""
    return shards.check(experts, sizes, rules)

  def __call__(
    self, x: jax.Array, assignment: Assignment, matrices: ExpertWeights, context: Context
  ) -> tuple[jax.Array, Facts]:
    """Returns Σ_k weight_k · expert_k(x) for tokens `x` [N, D]; there is nothing to log."""
    return shards.run(_run, x, assignment, matrices, context)


def _run(part: Part, experts: Experts) -> tuple[jax.Array, Facts]:
  with jax.named_scope('exchange'):
    whole = Part(*(jax.lax.all_gather(array, AXIS, tiled=True) for array in part))
  y = shards.apply_own(whole, experts)
  with jax.named_scope('return'):
    # In float32, as are the sums over experts that lie on one shard.
    y = jax.lax.psum_scatter(y.astype(jnp.float32), AXIS, tiled=True)
  return y.astype(part.x.dtype), {}
