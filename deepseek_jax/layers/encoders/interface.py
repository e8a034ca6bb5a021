"""What every encoder of media offers, and how what they make reaches a model."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from deepseek_jax.layers.weights import table


@struct.dataclass
class Tokens:
  """The tokens of R media: what an encoder's layers run on.

  Attributes:
    values: [R, N, W].
    real: [R, N] bool, False where the medium ended before; nothing real sees those.
    coordinates: [R, N, A] places in a grid or in space, or None where order is all.
  """

  values: jax.Array
  real: jax.Array
  coordinates: jax.Array | None = None


@runtime_checkable
class EncoderConfig(Protocol):
  """The config of an encoder kind: a stem, bidirectional layers, a merging of neighbours.

  A medium is an array of the shape `medium`, of which the first `count` entries are real.
  """

  @property
  def width(self) -> int:
    """Channels W of the encoder's stream."""

  @property
  def depth(self) -> int:
    """Layers."""

  @property
  def attention(self) -> Any:
    """Attention of every layer."""

  @property
  def feed_forward(self) -> Any:
    """Feed-forward of every layer."""

  @property
  def norm(self) -> Any:
    """Norm before each sublayer and at the end."""

  @property
  def medium(self) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of one medium."""

  @property
  def patches(self) -> int:
    """Tokens N of one medium in the encoder's layers."""

  @property
  def slots(self) -> int:
    """Embeddings that a medium becomes."""

  @property
  def stem_vectors(self) -> dict[str, int]:
    """Vectors of one medium that meet a weight of the stem, where they are not `patches`."""

  def stem(self, dtype: DTypeLike, name: str | None = None) -> nn.Module:
    """Returns a module `(media [R, …], counts [R]) -> Tokens`."""

  def join(self, tokens: Tokens) -> Tokens:
    """Joins neighbours: [R, N, W] to [R, slots, …]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
  """A learned vector for each place.

  Attributes:
    std: standard deviation at first.
  """

  std: float = 0.02

  def add(self, module: nn.Module, x: jax.Array) -> jax.Array:
    """Declares the table `position` in `module`, and adds it to `x` [R, N, W]."""
    place = table(module, 'position', x.shape[1:], (None, 'embed'), std=self.std)
    return x + place.astype(x.dtype)


def first_real(counts: jax.Array, total: int, each: int = 1) -> jax.Array:
  """Says which tokens are real where each token covers `each` entries of a medium.

  Args:
    counts: [R] int32 real entries.
    total: tokens N.
    each: entries a token.

  Returns:
    [R, N] bool; a token that covers one real entry is real.
  """
  return jnp.arange(total) * each < counts[:, None]


def join_line(tokens: Tokens, side: int) -> Tokens:
  """Joins `side` neighbours along a line: [R, N, W] to [R, N / side, side · W]."""
  rows, count, width = tokens.values.shape
  values = jnp.where(tokens.real[..., None], tokens.values, 0)
  real = tokens.real.reshape(rows, -1, side).any(axis=-1)
  return Tokens(values.reshape(rows, count // side, side * width), real)


def spread(coordinates: np.ndarray, rows: int) -> jax.Array:
  """Repeats the coordinates [N, A] of a grid for every medium, [R, N, A]."""
  return jnp.broadcast_to(jnp.asarray(coordinates), (rows, *coordinates.shape))


def not_divisible(size: int, name: str, parts: Sequence[tuple[str, int]]) -> list[str]:
  """Returns a message where `size` is not a multiple of the product of `parts`."""
  product = int(np.prod([part for _, part in parts]))
  if product < 1 or size % product == 0:
    return []
  words = ' · '.join(f'`{part}`' for part, _ in parts)
  return [f'`{name}` is {size}, not a multiple of {words} = {product}']
