"""Dispatch to experts that take a limited number of tokens."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe.dispatch import shards
from deepseek_jax.layers.moe.interface import Assignment
from deepseek_jax.ops.capacity import limit_load
from deepseek_jax.ops.experts import ExpertWeights
from deepseek_jax.sharding.rules import Rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
  """Lets each expert take at most its even share times a factor; the rest is dropped.

  An expert takes ⌈factor · N · K / E⌉ choices of the N tokens of a batch (with accumulation, of a
  microbatch), wherever they lie on the mesh. First choices go before second ones, and so on; among
  equals, tokens go in order. A choice that finds no room adds nothing to its token, whose other
  weights stay as they are. Padding is one of the N tokens, but takes no room.

  Attributes:
    factor: room of an expert over its even share.

  Source: GShard, arXiv 2006.16668, section 2.2 and algorithm 1; Switch Transformer, arXiv
    2101.03961, section 2.2.
  """

  factor: float = 1.25

  def __post_init__(self):
    if not self.factor > 0:
      raise ConfigError(f'`factor` is {self.factor}; expected a number above 0')

  def check(self, experts: int, sizes: Mapping[str, int], rules: Rules) -> list[str]:
    """Returns nothing: it runs on any mesh."""
    return []

  def room(self, choices: int, experts: int) -> int:
    """Returns how many of `choices` = N · K one of `experts` experts takes."""
    return math.ceil(self.factor * choices / experts)

  def __call__(
    self, x: jax.Array, assignment: Assignment, matrices: ExpertWeights, context: Context
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns Σ_k weight_k · expert_k(x) for tokens `x` [N, D] over the choices that found room.

    Logs `choices` [] of real tokens, and how many of them were `dropped` [].
    """
    count = matrices.gate.shape[0]
    with jax.named_scope('limit'):
      asked = jnp.where(context.real.reshape(-1, 1), assignment.experts, count)
      experts = limit_load(asked, count, self.room(asked.size, count))
      choices, taken = (jnp.sum(e < count, dtype=jnp.float32) for e in (asked, experts))
    facts = {'choices': choices, 'dropped': choices - taken}
    y, _ = shards.run(None, x, dataclasses.replace(assignment, experts=experts), matrices, context)
    return y, facts
