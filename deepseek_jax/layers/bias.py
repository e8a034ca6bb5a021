"""Offsets beside matrices, which most language models do without and most encoders do not."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np

from deepseek_jax.layers.weights import vector


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bias:
  """A learned offset on every output of a matrix, zero at first."""

  def add(
    self, module: nn.Module, name: str, y: jax.Array, axes: Sequence[str | None]
  ) -> jax.Array:
    """Declares the offset `name` in `module`, and adds it.

    Args:
      module: the module that owns it.
      name: its name there.
      y: [..., …] what the matrix made; its last axes are the offset's.
      axes: logical names of those axes.

    Returns:
      [..., …] in the dtype of `y`.
    """
    shape = y.shape[y.ndim - len(axes) :]
    return y + vector(module, name, np.zeros(shape, np.float32), axes).astype(y.dtype)


def add_bias(
  bias: Bias | None, module: nn.Module, name: str, y: jax.Array, axes: Sequence[str | None]
) -> jax.Array:
  """Adds an offset [..., …] to `y` where there is one; arguments are those of `Bias.add`."""
  return y if bias is None else bias.add(module, name, y, axes)
