"""How large pictures are seen closer: all of their tiles, or those that are worth a look."""

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.layers.context import NEWLINE, SEPARATOR, Media
from deepseek_jax.layers.weights import table, weight


class Chosen(NamedTuple):
  """Which tiles were taken.

  Attributes:
    boxes: [B, K, 5] float32 picture and region of each.
    gates: [B, K] float32, about 1: how much they are wanted.
  """

  boxes: jax.Array
  gates: jax.Array


class Whole(NamedTuple):
  """The whole pictures of each row, already encoded.

  Attributes:
    values: [B, P · side², D].
    real: [B, P · side²] bool.
    side: embeddings of a side of a picture.
  """

  values: jax.Array
  real: jax.Array
  side: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryTile:
  """Every tile of a picture is encoded.

  Where they lie is told by their order among newlines, see `ops.tiling.picture_layout`.

  Source: DeepSeek-VL2, arXiv 2412.10302, section 2.
  """

  def build(self, width: int, name: str | None = None) -> nn.Module:
    """Returns the module, for a model of `width` channels."""
    return AllTiles(width, name=name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progressive:
  """Pictures are read as a whole first, and then a few of their tiles, those worth most.

  A score is learned of each embedding of the whole picture; a tile's is the mean of those it
  covers. The tiles with the highest scores of a row are encoded, and no other: that is what is
  saved. A tile's embeddings are weighed by its score, which so has a gradient, and are told where
  they lie by a vector made of their box, since their order is that of the scores.

  Attributes:
    tiles: most tiles K of all pictures of a row.
  """

  tiles: int = 2

  def __post_init__(self):
    errors = wrong_sizes(self, ('tiles',))
    if errors:
      raise ConfigError(errors)

  def build(self, width: int, name: str | None = None) -> nn.Module:
    """Returns the module, for a model of `width` channels."""
    return WantedTiles(width, self, name=name)


class Marks(nn.Module):
  """Learned vectors [D] that stand at the end of a line, and between a picture and its tiles."""

  width: int

  def setup(self):
    """Declares the vectors."""
    std = 1 / math.sqrt(self.width)
    self.newline = table(self, 'newline', (1, self.width), (None, None), std=std)
    self.separator = table(self, 'separator', (1, self.width), (None, None), std=std)

  def marks(self) -> list[tuple[int, jax.Array]]:
    """Returns what each negative placeholder stands for, vectors [D]."""
    return [(NEWLINE, self.newline[0]), (SEPARATOR, self.separator[0])]


class AllTiles(Marks):
  """Leaves tiles [B, M, S, S, 3] and their embeddings [B, S, D] as they are."""

  def choose(self, tiles: Media, whole: Whole | None, count: int) -> tuple[Media, Chosen | None]:
    """Returns all tiles [B, M, …]."""
    del whole, count
    return tiles, None

  def weigh(self, x: jax.Array, chosen: Chosen) -> jax.Array:
    """Returns embeddings [B, S, D] as they are."""
    return x


class WantedTiles(Marks):
  """Tiles [B, M, S, S, 3] -> the K that are wanted most [B, K, S, S, 3]."""

  config: Progressive

  def setup(self):
    """Declares the vectors, and what scores and places are made with."""
    super().setup()
    self.want = weight(self, 'want', (self.width, 1), ('embed', None), dtype=jnp.float32)
    self.place = weight(self, 'place', (4, self.width), (None, 'embed'), dtype=jnp.float32)

  def choose(self, tiles: Media, whole: Whole | None, count: int) -> tuple[Media, Chosen | None]:
    """Returns the tiles with the highest scores.

    Args:
      tiles: all of them, with boxes.
      whole: the whole pictures.
      count: how many tiles K to take.

    Raises:
      ConfigError: there is no whole picture to choose by, or tiles have no boxes.
    """
    if whole is None or tiles.boxes is None:
      raise ConfigError(
        'Progressive chooses tiles by the whole picture: context.media needs `image`, and `tile` '
        'with boxes'
      )
    scores = self.scores(tiles.boxes, whole)
    scores = jnp.where(tiles.real, scores, -jnp.inf)
    _, taken = jax.lax.top_k(jax.lax.stop_gradient(scores), count)
    pick = lambda x: jnp.take_along_axis(  # noqa: E731
      x, taken.reshape(*taken.shape, *(1,) * (x.ndim - 2)), axis=1
    )
    chosen = Media(pick(tiles.values), pick(tiles.counts), pick(tiles.boxes))
    best = jnp.where(chosen.real, pick(scores), 0.0)
    return chosen, Chosen(pick(tiles.boxes), 2.0 * jax.nn.sigmoid(best))

  def scores(self, boxes: jax.Array, whole: Whole) -> jax.Array:
    """Returns how much each tile is wanted, [B, M] float32.

    Args:
      boxes: [B, M, 5] picture, top, left, bottom, right; the latter as shares of the picture.
      whole: the whole pictures.
    """
    x, real, side = whole
    need = jnp.einsum('bsd,do->bs', x.astype(jnp.float32), self.want)
    number = jnp.arange(x.shape[1])
    picture, place = number // side**2, number % side**2
    y, z = (place // side + 0.5) / side, (place % side + 0.5) / side
    box = boxes[..., None]
    inside = (box[:, :, 0] == picture) & real[:, None]
    inside &= (box[:, :, 1] <= y) & (y < box[:, :, 3]) & (box[:, :, 2] <= z) & (z < box[:, :, 4])
    share = inside / jnp.maximum(jnp.sum(inside, axis=-1, keepdims=True), 1)
    return jnp.einsum('bms,bs->bm', share, need)

  def weigh(self, x: jax.Array, chosen: Chosen) -> jax.Array:
    """Tells embeddings [B, K · slots, D] where their tile lies, and how much it was wanted."""
    batch, count = chosen.gates.shape
    parts = x.reshape(batch, count, -1, x.shape[-1])
    where = jnp.einsum('bmc,cd->bmd', chosen.boxes[..., 1:], self.place)
    parts = (parts + where[:, :, None]) * chosen.gates[..., None, None]
    return parts.astype(x.dtype).reshape(x.shape)
