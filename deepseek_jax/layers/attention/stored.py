"""Number formats in which caches would hold keys: numbers are rounded, and computed with as ever.

This is how the released models of V3.2 and V4 compute, and how V4 was trained in the end: the
gradient takes no notice of the rounding.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.formats import float4, float8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float8:
  """E4M3 with a power of two for the scale of `group` neighbouring channels.

  Attributes:
    group: channels that share a scale; the last group may be smaller.
  """

  group: int = 128

  def __post_init__(self):
    if self.group < 1:
      raise ConfigError(f'`group` is {self.group}; expected 1 or more channels')

  def check(self, channels: int) -> list[str]:
    """Returns what is wrong with it for so many channels: nothing."""
    del channels
    return []

  def round(self, x: jax.Array) -> jax.Array:
    """Returns `x` [..., d] as it would come back."""
    tile = (1, self.group)
    return _through(x, float8.decode(float8.encode(x, tile), tile))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float4:
  """E2M1 with a power of two for the scale of 32 neighbouring channels: MXFP4."""

  def check(self, channels: int) -> list[str]:
    """Returns what is wrong with it for so many channels."""
    if channels % float4.BLOCK:
      return [f'Float4 needs a multiple of {float4.BLOCK} channels; there are {channels}']
    return []

  def round(self, x: jax.Array) -> jax.Array:
    """Returns `x` [..., d] as it would come back."""
    return _through(x, float4.decode(float4.encode(x)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hadamard:
  """Rotates index queries and keys alike, which spreads outliers before they are rounded.

  The scores stay what they are, but for rounding: it is of use to number formats alone.

  Source: DeepSeek-V3.2-Exp, inference code.
  """

  def check(self, channels: int) -> list[str]:
    """Returns what is wrong with it for so many channels."""
    if channels & (channels - 1):
      return [f'a Hadamard rotation needs a power of two; there are {channels} channels']
    return []

  def rotate(self, x: jax.Array) -> jax.Array:
    """Multiplies [..., d] with the orthogonal Hadamard matrix [d, d]; d is a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < x.shape[-1]:
      matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= np.sqrt(len(matrix))
    return jnp.einsum('...d,de->...e', x, jnp.asarray(matrix, x.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
  """What a cache would hold of each token; the defaults are those of V3.2.

  Attributes:
    key: format of the latent of latent attention, or of the channels of V4's keys and entries that
      are not rotated to positions; None leaves them as they are.
    index: format of an indexer's queries and keys, or None; no matter where there is no indexer.
    rotation: of those, before they are rounded, or None.

  Source: DeepSeek-V3.2-Exp and DeepSeek-V4, arXiv 2606.19348, inference code.
  """

  key: Float8 | Float4 | None = Float8()
  index: Float8 | Float4 | None = Float8()
  rotation: Hadamard | None = Hadamard()

  def check(self, key: int, index: int | None = None) -> list[str]:
    """Returns what is wrong with it for keys and index keys of so many channels."""
    errors = [] if self.key is None else [f'key: {text}' for text in self.key.check(key)]
    if index is None:
      return errors
    parts = {'index': self.index, 'rotation': self.rotation}
    return errors + [
      f'{name}: {text}'
      for name, part in parts.items()
      if part is not None
      for text in part.check(index)
    ]

  def round_key(self, x: jax.Array) -> jax.Array:
    """Returns keys [..., d] as they would come back."""
    return x if self.key is None else self.key.round(x)

  def round_index(self, x: jax.Array) -> jax.Array:
    """Returns index queries or keys [..., d], rotated, as they would come back."""
    if self.rotation is not None:
      x = self.rotation.rotate(x)
    return x if self.index is None else self.index.round(x)


V4 = Stored(key=Float8(group=64), index=Float4())
"""As V4 has it: 448 channels in seven groups, and an index of four bits."""


def _through(x: jax.Array, rounded: jax.Array) -> jax.Array:
  """Returns `rounded`, with the gradient of `x`."""
  return jax.lax.stop_gradient(rounded.astype(x.dtype)) + (x - jax.lax.stop_gradient(x))
