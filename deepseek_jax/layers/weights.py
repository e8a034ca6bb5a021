"""The one place where layers declare weights, state they read, and what they report."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

BATCH_AXES = ('layers', 'stage', 'expert', 'lanes')
"""Axes along which a weight is a stack of independent matrices."""


@struct.dataclass
class Labelled(nn.Partitioned[Any]):
  """An array with the names of its axes, which are for our own table alone to translate.

  Linen's box takes the names for mesh axes when it is opened under a mesh.
  """

  def unbox(self, apply_constraint: bool = True) -> Any:
    """Returns the array [...] as it is."""
    return self.value


class Met(NamedTuple):
  """What one token does with a parameter array, on average.

  Attributes:
    share: the share of its parameters that the token meets; of experts, those it chose.
    products: how many times over the token is multiplied with that share.
  """

  share: float
  products: float = 1.0


def labelled(init: Callable[..., jax.Array], axes: Sequence[str | None]) -> Callable[..., Any]:
  """Returns an initialiser whose result [...] carries the names of its axes."""
  return lambda *arguments: Labelled(init(*arguments), names=tuple(axes))


def weight(
  module: nn.Module,
  name: str,
  shape: Sequence[int],
  axes: Sequence[str | None],
  *,
  dtype: DTypeLike,
  inputs: int = 1,
  gain: float = 1.0,
) -> jax.Array:
  """Declares a matrix and returns it in the compute dtype.

  The master copy is float32, normal with standard deviation gain / √(fan-in).

  Args:
    module: the module that owns the weight.
    name: its name in the module.
    shape: sizes of its axes; batch axes (`expert`), then input axes, then output axes.
    axes: logical axis names, one an axis; None is never sharded.
    dtype: dtype of the activations that the weight will meet.
    inputs: how many axes, after the batch axes, are inputs.
    gain: factor on the standard deviation, where a matrix is one of several that are summed.
  """
  batch = sum(axis in BATCH_AXES for axis in axes)
  fan_in = math.prod(shape[batch : batch + inputs])
  init = nn.initializers.normal(gain / math.sqrt(fan_in))
  return module.param(name, labelled(init, tuple(axes)), tuple(shape)).astype(dtype)


def scale(module: nn.Module, name: str, size: int) -> jax.Array:
  """Declares the scale [size] of a norm, float32, ones at first."""
  init = labelled(nn.initializers.ones, (None,))
  return module.param(name, init, (size,))


def vector(
  module: nn.Module, name: str, value: np.ndarray, axes: Sequence[str | None] = (None,)
) -> jax.Array:
  """Declares a float32 array that is no matrix, such as [H], and starts at `value`."""
  init = labelled(lambda _: jnp.asarray(value, jnp.float32), tuple(axes))
  return module.param(name, init)


def table(
  module: nn.Module, name: str, shape: Sequence[int], axes: Sequence[str | None], std: float
) -> jax.Array:
  """Declares a look-up table in float32, normal with standard deviation `std`."""
  init = labelled(nn.initializers.normal(std), tuple(axes))
  return module.param(name, init, tuple(shape))


def buffer(
  module: nn.Module,
  name: str,
  shape: Sequence[int],
  axes: Sequence[str | None],
  init: Callable[[], jax.Array] | None = None,
) -> Any:
  """Declares state that is not learnt: the forward pass reads it, the training step may update it.

  In the collection `buffers`; float32 zeros at first.

  Args:
    module: the module that owns it.
    name: its name in the module.
    shape: sizes of its axes.
    axes: logical axis names, one an axis; None is never sharded.
    init: returns it as it is at first, such as [V, K], in any dtype; None makes zeros.
  """
  if init is None:
    init = functools.partial(jnp.zeros, tuple(shape), jnp.float32)
  return module.variable('buffers', name, labelled(init, tuple(axes))).value


def observe(module: nn.Module, name: str, value: Any) -> None:
  """Reports a value that the step logs or updates state from (collection `observed`).

  Values are sums over tokens, so that microbatches and shards add up.
  """
  if module.is_mutable_collection('observed') and not module.is_initializing():
    module.put_variable('observed', name, jax.lax.stop_gradient(value))


def add_loss(module: nn.Module, name: str, value: jax.Array) -> None:
  """Reports a differentiable, weighted loss of a layer (collection `losses`).

  The value [] is a sum over the rows of the batch: the objective divides by the rows of the whole
  batch, once, so that accumulation over microbatches is exact.
  """
  if module.is_mutable_collection('losses') and not module.is_initializing():
    module.put_variable('losses', name, value)
