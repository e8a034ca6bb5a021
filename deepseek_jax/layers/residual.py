"""How a sublayer's output joins the stream that runs through the stack."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Add:
  """The plain residual: the stream is x, and a sublayer's output is added to it."""

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return AddResidual(self, name=name)

  @property
  def stream_axes(self) -> tuple[str, ...]:
    """Logical axes of the stream [B, T, D]."""
    return ('batch', 'seq', 'act_embed')

  def mixing_flops(self, width: int) -> float:
    """Forward FLOPs a token of one sublayer's reading and writing: an addition is not counted."""
    del width
    return 0.0


class AddResidual(nn.Module):
  """Reads the whole stream [B, T, D] and adds to it."""

  config: Add

  def open(self, x: jax.Array) -> jax.Array:
    """Makes the stream from embeddings [B, T, D]."""
    return x

  def read(self, stream: jax.Array) -> tuple[jax.Array, Any]:
    """Returns the sublayer's input [B, T, D] and what `write` needs to know (nothing)."""
    return stream, None

  def write(self, stream: jax.Array, y: jax.Array, mix: Any) -> jax.Array:
    """Adds a sublayer's output `y` [B, T, D]."""
    return stream + y

  def close(self, stream: jax.Array) -> jax.Array:
    """Collapses the stream to [B, T, D]."""
    return stream
