"""Pictures and clips as tokens: patches in, neighbours joined at the end."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.layers.attention.bidirectional import Bidirectional
from deepseek_jax.layers.bias import Bias, add_bias
from deepseek_jax.layers.encoders.interface import (
  Learned,
  Tokens,
  first_real,
  not_divisible,
  spread,
)
from deepseek_jax.layers.feed_forward import MLP, SwiGLU
from deepseek_jax.layers.norm import LayerNorm, RMSNorm
from deepseek_jax.layers.weights import weight
from deepseek_jax.ops.linear import linear
from deepseek_jax.ops.patch import (
  extract_blocks,
  extract_patches,
  grid_coordinates,
  merge_neighbours,
  unshuffle_neighbours,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenMajor:
  """Neighbours are joined one after the other, the upper left first."""

  def join(self, x: jax.Array, side: int) -> jax.Array:
    """Joins squares of `side`² tokens of a square grid, `x` [R, N, W]."""
    return merge_neighbours(x, side)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelMajor:
  """Neighbours are joined channel by channel, as the weights of DeepSeek-VL2 expect them.

  Source: DeepSeek-VL2, arXiv 2412.10302, section 2.
  """

  def join(self, x: jax.Array, side: int) -> jax.Array:
    """Joins squares of `side`² tokens of a square grid, `x` [R, N, W]."""
    return unshuffle_neighbours(x, side)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patch2D:
  """An encoder of square pictures: patches, bidirectional layers, neighbours joined.

  Attributes:
    size: pixels S of a side of the picture.
    patch: pixels P of a side of a patch.
    merge: side of the square of neighbouring patches that become one token of the decoder.
    width: channels of the encoder's stream.
    depth: layers.
    attention: attention of every layer; with `rope=Axial()` it knows lines and columns.
    feed_forward: feed-forward of every layer.
    norm: norm before each sublayer and at the end.
    position: what is added to a patch for its place, or None.
    bias: offset beside the patches' matrix, or None.
    order: of the channels of neighbours that are joined.

  Source: Dosovitskiy et al., arXiv 2010.11929, section 3.1; the merging of neighbours and the
    two-layer projection: DeepSeek-VL2, arXiv 2412.10302, section 2.
  """

  width: int
  depth: int
  attention: Bidirectional
  feed_forward: SwiGLU | MLP
  size: int = 64
  patch: int = 8
  merge: int = 2
  norm: RMSNorm | LayerNorm = RMSNorm()
  position: Learned | None = Learned()
  bias: Bias | None = None
  order: TokenMajor | ChannelMajor = TokenMajor()

  def __post_init__(self):
    errors = wrong_sizes(self, ('size', 'patch', 'merge', 'width', 'depth'))
    # Channel-major joining fills a grid up to whole squares, as pixels may be left over before.
    if not errors and not isinstance(self.order, ChannelMajor):
      parts = [('patch', self.patch), ('merge', self.merge)]
      errors = not_divisible(self.size, 'size', parts)
    if not errors and self.size < self.patch:
      errors.append(f'`size` is {self.size}, less than one `patch` of {self.patch}')
    if errors:
      raise ConfigError(errors)

  @property
  def side(self) -> int:
    """Patches of a side; pixels that fill no patch are left out."""
    return self.size // self.patch

  @property
  def patches(self) -> int:
    """Patches N of a picture: tokens of the encoder."""
    return self.side**2

  @property
  def slots(self) -> int:
    """Tokens of the decoder that a picture takes the place of."""
    return (-(-self.side // self.merge)) ** 2

  @property
  def medium(self) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a picture."""
    return (self.size, self.size, 3), 'uint8'

  @property
  def stem_vectors(self) -> dict[str, int]:
    """Vectors that meet a weight of the stem, where they are not `patches`: none."""
    return {}

  def stem(self, dtype: DTypeLike, name: str | None = None) -> nn.Module:
    """Returns the module that makes the encoder's tokens."""
    return PatchStem(self, dtype, name=name)

  def join(self, tokens: Tokens) -> Tokens:
    """Joins squares of neighbours, [R, N, W] to [R, slots, merge² · W]."""
    values = self.order.join(tokens.values, self.merge)
    return Tokens(values, jnp.repeat(tokens.real[:, :1], values.shape[1], axis=1))


class PatchStem(nn.Module):
  """Pictures [R, S, S, 3] uint8 -> tokens [R, N, W], row by row from the upper left.

  A convolution whose stride is its size is one matrix product a patch.
  """

  config: Patch2D
  dtype: DTypeLike

  @nn.compact
  def __call__(self, images: jax.Array, counts: jax.Array) -> Tokens:
    """Embeds the patches of `images` [R, S, S, 3], and adds what tells their places."""
    c = self.config
    used = c.side * c.patch
    pixels = images[:, :used, :used].astype(self.dtype) / 127.5 - 1.0
    shape = (c.patch * c.patch * 3, c.width)
    kernel = weight(self, 'kernel', shape, (None, 'embed'), dtype=self.dtype)
    x = linear(extract_patches(pixels, c.patch), kernel)
    x = add_bias(c.bias, self, 'bias', x, (None,))
    if c.position is not None:
      x = c.position.add(self, x)
    real = jnp.broadcast_to(counts[:, None] > 0, x.shape[:2])
    return Tokens(x, real, spread(grid_coordinates((c.side, c.side)), x.shape[0]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patch3D:
  """An encoder of clips of square frames: blocks of space and time, bidirectional layers.

  Attributes:
    frames: most frames F of a clip; shorter ones are told by their count.
    size: pixels S of a side of a frame.
    span: frames of a block.
    patch: pixels P of a side of a block.
    merge: side of the square of neighbouring blocks of one time that become one token.
    width: channels of the encoder's stream.
    depth: layers.
    attention: attention of every layer; with `rope=Axial()` it knows time, lines and columns.
    feed_forward: feed-forward of every layer.
    norm: norm before each sublayer and at the end.
    position: what is added to a block for its place, or None.
    bias: offset beside the blocks' matrix, or None.

  Source: Arnab et al., arXiv 2103.15691, section 3.2 (tubelet embedding).
  """

  width: int
  depth: int
  attention: Bidirectional
  feed_forward: SwiGLU | MLP
  frames: int = 8
  size: int = 32
  span: int = 2
  patch: int = 8
  merge: int = 2
  norm: RMSNorm | LayerNorm = RMSNorm()
  position: Learned | None = Learned()
  bias: Bias | None = None

  def __post_init__(self):
    sizes = ('frames', 'size', 'span', 'patch', 'merge', 'width', 'depth')
    errors = wrong_sizes(self, sizes)
    if not errors:
      parts = [('patch', self.patch), ('merge', self.merge)]
      errors = not_divisible(self.size, 'size', parts)
      errors += not_divisible(self.frames, 'frames', [('span', self.span)])
    if errors:
      raise ConfigError(errors)

  @property
  def grid(self) -> tuple[int, int, int]:
    """Blocks along time, down and across."""
    return self.frames // self.span, self.size // self.patch, self.size // self.patch

  @property
  def patches(self) -> int:
    """Blocks N of a clip: tokens of the encoder."""
    return self.grid[0] * self.grid[1] * self.grid[2]

  @property
  def slots(self) -> int:
    """Tokens of the decoder that a clip takes the place of."""
    return self.patches // self.merge**2

  @property
  def medium(self) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a clip."""
    return (self.frames, self.size, self.size, 3), 'uint8'

  @property
  def stem_vectors(self) -> dict[str, int]:
    """Vectors that meet a weight of the stem, where they are not `patches`: none."""
    return {}

  def stem(self, dtype: DTypeLike, name: str | None = None) -> nn.Module:
    """Returns the module that makes the encoder's tokens."""
    return BlockStem(self, dtype, name=name)

  def join(self, tokens: Tokens) -> Tokens:
    """Joins squares of blocks of one time, [R, N, W] to [R, slots, merge² · W]."""
    (rows, _, width), times = tokens.values.shape, self.grid[0]
    values = merge_neighbours(tokens.values.reshape(rows * times, -1, width), self.merge)
    real = tokens.real.reshape(rows, times, -1)[:, :, : values.shape[1]]
    return Tokens(values.reshape(rows, -1, values.shape[-1]), real.reshape(rows, -1))


class BlockStem(nn.Module):
  """Clips [R, F, S, S, 3] uint8 -> tokens [R, N, W], by time, then row by row."""

  config: Patch3D
  dtype: DTypeLike

  @nn.compact
  def __call__(self, clips: jax.Array, counts: jax.Array) -> Tokens:
    """Embeds the blocks of `clips` [R, F, S, S, 3], of which `counts` [R] frames are real."""
    c = self.config
    pixels = clips.astype(self.dtype) / 127.5 - 1.0
    # A block that reaches beyond the end of its clip sees grey there.
    inside = first_real(counts, c.frames)[:, :, None, None, None]
    blocks = extract_blocks(jnp.where(inside, pixels, 0), c.span, c.patch)
    shape = (blocks.shape[-1], c.width)
    kernel = weight(self, 'kernel', shape, (None, 'embed'), dtype=self.dtype)
    x = linear(blocks, kernel)
    x = add_bias(c.bias, self, 'bias', x, (None,))
    if c.position is not None:
      x = c.position.add(self, x)
    real = jnp.repeat(first_real(counts, c.grid[0], c.span), c.grid[1] * c.grid[2], axis=1)
    return Tokens(x, real, spread(grid_coordinates(c.grid), x.shape[0]))
