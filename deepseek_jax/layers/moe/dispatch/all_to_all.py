"""Dispatch of tokens to the shards of their experts."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe.dispatch import shards
from deepseek_jax.layers.moe.dispatch.shards import AXIS, Experts, Facts, Part
from deepseek_jax.layers.moe.interface import Assignment
from deepseek_jax.ops.exchange import plan_exchange, ragged_exchange, ragged_return, received_sizes
from deepseek_jax.ops.expert_rows import combine, sort_by_expert, spread
from deepseek_jax.ops.experts import ExpertWeights, apply_to_rows
from deepseek_jax.sharding.rules import Rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllToAll:
  """Expert parallelism: every choice travels to the shard of its expert, and its result back.

  Needs rules by which experts, and rows of the batch, lie on the mesh axis `expert`: the preset
  EXPERT. Where that axis has one device, every token stays where it is. Where it has several but
  tokens do not lie along it (a batch that its devices do not divide, as one row in decoding),
  nothing has to travel either: each shard runs its own experts, and the results are summed.

  It drops nothing, so that each of P shards must have room for everything: for P times the n · K
  rows that it sends itself, forward and backward. What has not arrived is not multiplied. `bound`
  is for less room.

  Attributes:
    chunks: parts that a shard's tokens are sent in, so that one part travels while another is with
      its experts; each has a buffer of its own, `chunks` times smaller.
    bound: room of a shard, over its even share, which is the n · K rows that it sends itself.
      Choices beyond are dropped, those of the shard's last experts first, and counted; padding
      then does not travel. None is room for everything.

  Source: GShard, arXiv 2006.16668, section 3.2; dropless: MegaBlocks, arXiv 2211.15841, section 3.
  """

  chunks: int = 1
  bound: float | None = None

  def __post_init__(self):
    errors = []
    if self.chunks < 1:
      errors.append(f'`chunks` is {self.chunks}; expected 1 or more')
    if self.bound is not None and not self.bound >= 1:
      errors.append(f'`bound` is {self.bound}; expected 1 or more, or None for room for everything')
    if errors:
      raise ConfigError(errors)

  def check(self, experts: int, sizes: Mapping[str, int], rules: Rules) -> list[str]:
    """Returns what is wrong with `experts` experts on a mesh of these sizes, as messages."""
    errors = shards.check(experts, sizes, rules)
    if AXIS not in rules.batch + rules.seq:
      errors.append(
        f'needs tokens that lie along the mesh axis `{AXIS}`, but rules.batch is {rules.batch}; '
        'the preset EXPERT has them there'
      )
    return errors

  def room(self, choices: int, count: int) -> int:
    """Returns rows that one of `count` shards has room for if each has `choices` = n · K."""
    everything = choices * count
    return everything if self.bound is None else min(everything, math.ceil(self.bound * choices))

  def __call__(
    self, x: jax.Array, assignment: Assignment, matrices: ExpertWeights, context: Context
  ) -> tuple[jax.Array, Facts]:
    """Returns Σ_k weight_k · expert_k(x) for tokens `x` [N, D].

    With a bound, logs `choices` [] of real tokens and how many of them were `dropped` [].
    """
    return shards.run(self._run, x, assignment, matrices, context)

  def _run(self, part: Part, held: Experts) -> tuple[jax.Array, Facts]:
    """Sends a shard's tokens, in chunks, to the shards of their experts; returns [n, D]."""
    size = math.ceil(len(part.x) / min(self.chunks, len(part.x)))
    results = [
      self._run_chunk(Part(*(array[start : start + size] for array in part)), held)
      for start in range(0, len(part.x), size)
    ]
    facts = jax.tree.map(lambda *parts: sum(parts), *(facts for _, facts in results))
    return jnp.concatenate([y for y, _ in results]), facts

  def _run_chunk(self, part: Part, held: Experts) -> tuple[jax.Array, Facts]:
    experts, total = part.experts, held.held * held.shards
    if self.bound is not None:
      experts = jnp.where(part.real[:, None], experts, total)
    room = self.room(experts.size, held.shards)
    with jax.named_scope('sort'):
      layout = sort_by_expert(experts, total)
      rows = spread(part.x, layout)
    with jax.named_scope('exchange'):
      plan = plan_exchange(layout.sizes, AXIS, room)
      rows = ragged_exchange(rows, plan, AXIS, room)
    with jax.named_scope('experts'):
      rows = apply_to_rows(rows, received_sizes(plan), held.matrices, held.gather)
    with jax.named_scope('return'):
      rows = ragged_return(rows, plan, AXIS, experts.size)
    with jax.named_scope('combine'):
      y = combine(rows, part.weights, layout)
    if self.bound is None:
      return y, {}
    choices = jnp.sum(layout.sizes).astype(jnp.float32)
    return y, {'choices': choices, 'dropped': choices - jnp.sum(plan.size[plan.shard])}
