"""What a training step takes and returns."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class TrainState:
  """Everything that a run must remember between steps.

  Attributes:
    step: scalar int32, finished steps.
    params: nested dict of float32 arrays, the master weights.
    buffers: nested dict of arrays that rules other than gradients update.
    opt_state: the optimizer's pytree.
    ema: averaged weights; may be empty.
    guard: loss scale, skip counters and spike statistics; may be empty.
    carry: per-replica error feedback; may be empty.
  """

  step: jax.Array
  params: Any
  buffers: Any
  opt_state: Any
  ema: Any = ()
  guard: Any = ()
  carry: Any = ()


def fresh_state(
  params: Any, buffers: Any, opt_state: Any, ema: Any = (), guard: Any = (), carry: Any = ()
) -> TrainState:
  """Returns the state before the first step; its step is [] int32, zero."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    buffers=buffers,
    opt_state=opt_state,
    ema=ema,
    guard=guard,
    carry=carry,
  )


def accepted_steps(state: TrainState) -> jax.Array:
  """Returns how many updates the weights have seen, [] int32: the optimizer's own count."""
  return state.step - state.guard.skipped if state.guard else state.step
