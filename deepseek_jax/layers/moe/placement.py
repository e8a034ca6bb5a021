"""Experts in more slots than there are experts: heavy ones have several, which take turns."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe.experts import INWARD, OUTWARD
from deepseek_jax.layers.moe.interface import Assignment, Dispatch
from deepseek_jax.layers.weights import buffer
from deepseek_jax.ops.experts import ExpertWeights
from deepseek_jax.ops.placement import to_slots

SLOTS = 'slots'
TOKENS = 'expert_tokens'

type Dispatched = tuple[jax.Array, dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replicas:
  """Puts experts into slots, which lie on the devices in the place of the experts.

  The buffer `slots` [P] says which expert lies in which slot. The matrices of the slots are copies
  of the experts' that every pass makes anew: weights, gradients and the optimizer stay those of the
  experts, whatever lies where, and replicas cannot drift apart.

  What it buys is even work of devices that tokens travel to (`AllToAll`), where better slots are
  given: see `Rebalance`. The price, in every pass: the compiler brings the matrices of all of the
  layer's experts to every device (cut over `expert_embed` still) for a device to take its slots'
  from, and sums their gradients so; the copies are kept for the backward pass, unless the layer is
  recomputed. It pays where the busiest device costs more than that.

  Attributes:
    slots: places for experts P on all devices together, `experts` or more.

  Source: DeepSeek-V3, arXiv 2412.19437, section 3.4 (redundant experts).
  """

  slots: int

  def check(self, experts: int) -> list[str]:
    """Returns what is wrong with `experts` experts, as messages."""
    if self.slots < experts:
      return [f'`slots` is {self.slots}, fewer than the {experts} experts']
    return []

  def around(
    self, dispatch: Dispatch, module: nn.Module, experts: int
  ) -> Callable[[jax.Array, Assignment, ExpertWeights, Context], Dispatched]:
    """Returns a dispatch to slots, made of one to experts.

    Declares two buffers in `module`: `slots` [P] int32, and `expert_tokens` [E], tokens that chose
    each expert since the slots were last filled, which the step counts.

    Args:
      dispatch: any; it is told of P experts.
      module: that owns the buffers.
      experts: number of experts E.
    """
    slots = buffer(
      module,
      SLOTS,
      (self.slots,),
      (None,),
      lambda: jnp.arange(self.slots, dtype=jnp.int32) % experts,
    )
    buffer(module, TOKENS, (experts,), (None,))

    def dispatch_to_slots(
      x: jax.Array, assignment: Assignment, matrices: ExpertWeights, context: Context
    ) -> Dispatched:
      def fetch(matrix: jax.Array, axes: tuple[str, str, str]) -> jax.Array:
        return context.rules.constrain(jnp.take(matrix, slots, axis=0), axes)

      with jax.named_scope('replicas'):
        chosen = dataclasses.replace(
          assignment, experts=to_slots(assignment.experts, slots, experts)
        )
        copies = matrices.of(
          gate=fetch(matrices.gate, INWARD),
          up=fetch(matrices.up, INWARD),
          down=fetch(matrices.down, OUTWARD),
        )
      return dispatch(x, chosen, copies, context)

    return dispatch_to_slots
