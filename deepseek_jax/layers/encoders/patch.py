"""Pictures as tokens: patches in, and out to the width of a decoder."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.layers.attention.bidirectional import Bidirectional
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.weights import table, weight
from deepseek_jax.ops.patch import extract_patches, merge_neighbours


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patch2D:
  """An encoder of square pictures: patches, bidirectional layers, projection.

  Attributes:
    size: pixels S of a side of the picture.
    patch: pixels P of a side of a patch.
    merge: side of the square of neighbouring patches that become one token of the decoder.
    width: channels of the encoder's stream.
    depth: layers.
    attention: attention of every layer.
    feed_forward: feed-forward of every layer.
    norm: norm before each sublayer and at the end.

  Source: Dosovitskiy et al., arXiv 2010.11929, section 3.1; the merging of neighbours and the
    two-layer projection: DeepSeek-VL2, arXiv 2412.10302, section 2.
  """

  width: int
  depth: int
  attention: Bidirectional
  feed_forward: SwiGLU
  size: int = 64
  patch: int = 8
  merge: int = 2
  norm: RMSNorm = RMSNorm()

  def __post_init__(self):
    errors = wrong_sizes(self, ('size', 'patch', 'merge', 'width', 'depth'))
    if not errors and self.size % (self.patch * self.merge):
      errors.append(
        f'`size` is {self.size}, not a multiple of `patch` · `merge` = {self.patch * self.merge}'
      )
    if errors:
      raise ConfigError(errors)

  @property
  def patches(self) -> int:
    """Patches N of a picture: tokens of the encoder."""
    return (self.size // self.patch) ** 2

  @property
  def slots(self) -> int:
    """Tokens of the decoder that a picture takes the place of."""
    return self.patches // self.merge**2

  def stem(self, dtype: DTypeLike, name: str | None = None) -> nn.Module:
    """Returns the module that makes the encoder's tokens."""
    return PatchStem(self, dtype, name=name)

  def projection(self, width: int, name: str | None = None) -> nn.Module:
    """Returns the module that makes a decoder's embeddings, `width` channels each."""
    return PatchProjection(self, width, name=name)


class PatchStem(nn.Module):
  """Pictures [R, S, S, 3] uint8 -> tokens [R, N, W], row by row from the upper left.

  A convolution whose stride is its size is one matrix product a patch.
  """

  config: Patch2D
  dtype: DTypeLike

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Embeds the patches of `images` [R, S, S, 3] and adds a learned position."""
    c = self.config
    pixels = images.astype(self.dtype) / 127.5 - 1.0
    shape = (c.patch * c.patch * 3, c.width)
    kernel = weight(self, 'kernel', shape, (None, 'embed'), dtype=self.dtype)
    tokens = jnp.einsum('rnp,pd->rnd', extract_patches(pixels, c.patch), kernel)
    place = table(self, 'position', (c.patches, c.width), (None, 'embed'), std=0.02)
    return tokens + place.astype(self.dtype)


class PatchProjection(nn.Module):
  """Tokens [R, N, W] -> embeddings [R, N / merge², D] for a decoder."""

  config: Patch2D
  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Joins neighbouring tokens of `x` [R, N, W] and projects them."""
    x = merge_neighbours(x, self.config.merge)
    up = weight(self, 'up', (x.shape[-1], self.width), ('embed', 'mlp'), dtype=x.dtype)
    down = weight(self, 'down', (self.width, self.width), ('mlp', 'embed'), dtype=x.dtype)
    h = jax.nn.gelu(jnp.einsum('rnd,df->rnf', x, up), approximate=False)
    return jnp.einsum('rnf,fd->rnd', h, down)
