"""From an encoder's channels to those of a model: one way for all media, or one for each."""

import dataclasses

import flax.linen as nn
import jax

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.layers.bias import Bias, add_bias
from deepseek_jax.layers.weights import weight
from deepseek_jax.ops.linear import linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeparateProjection:
  """Two matrices with a GELU between them for each kind of media, straight to the model's width.

  Attributes:
    bias: offsets beside both matrices, or None.

  Source: DeepSeek-VL, arXiv 2403.05525, section 3.1 (its adaptor for one encoder).
  """

  bias: Bias | None = None

  def own(self, width: int, name: str | None = None) -> nn.Module:
    """Returns what each encoder ends in, for a model of `width` channels."""
    return OwnProjection(self, width, name=name)

  def joint(self, width: int, name: str | None = None) -> nn.Module | None:
    """Returns what all encoders share: nothing."""
    del width, name
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedProjection:
  """One matrix for all kinds of media, to a space that they share.

  Encoders differ in width, so each comes to `shared_dim` channels by a matrix of its own and a
  GELU; from there all media pass the same matrix to the shared space, and another to the model's
  width.

  Attributes:
    shared_dim: channels of the shared space.
    bias: offsets beside the matrices, or None.
  """

  shared_dim: int = 1024
  bias: Bias | None = None

  def __post_init__(self):
    errors = wrong_sizes(self, ('shared_dim',))
    if errors:
      raise ConfigError(errors)

  def own(self, width: int, name: str | None = None) -> nn.Module:
    """Returns what each encoder ends in, whatever the `width` of the model."""
    del width
    return Entry(self, name=name)

  def joint(self, width: int, name: str | None = None) -> nn.Module | None:
    """Returns what all encoders share, to `width` channels."""
    return JointProjection(self, width, name=name)


class OwnProjection(nn.Module):
  """[R, N, W] -> [R, N, D]."""

  config: SeparateProjection
  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Projects `x` [R, N, W]."""
    bias = self.config.bias
    up = weight(self, 'up', (x.shape[-1], self.width), ('embed', 'mlp'), dtype=x.dtype)
    down = weight(self, 'down', (self.width, self.width), ('mlp', 'embed'), dtype=x.dtype)
    h = add_bias(bias, self, 'up_bias', linear(x, up), ('mlp',))
    y = linear(jax.nn.gelu(h, approximate=False), down)
    return add_bias(bias, self, 'down_bias', y, (None,))


class Entry(nn.Module):
  """[R, N, W] -> [R, N, S]."""

  config: SharedProjection

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Brings `x` [R, N, W] to the channels that all media have."""
    c = self.config
    up = weight(self, 'up', (x.shape[-1], c.shared_dim), ('embed', 'mlp'), dtype=x.dtype)
    h = add_bias(c.bias, self, 'up_bias', linear(x, up), ('mlp',))
    return jax.nn.gelu(h, approximate=False)


class JointProjection(nn.Module):
  """[R, N, S] -> [R, N, D], the same for all media."""

  config: SharedProjection
  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Projects `x` [R, N, S] to the shared space, and from there to the model."""
    bias, size = self.config.bias, self.config.shared_dim
    space = weight(self, 'space', (size, size), ('mlp', 'embed'), dtype=x.dtype)
    out = weight(self, 'out', (size, self.width), ('embed', None), dtype=x.dtype)
    z = add_bias(bias, self, 'space_bias', linear(x, space), (None,))
    return add_bias(bias, self, 'out_bias', linear(z, out), (None,))
