"""Point clouds as tokens: a few spread points, each with what lies around it."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.layers.attention.bidirectional import Bidirectional
from deepseek_jax.layers.encoders.interface import Tokens, first_real
from deepseek_jax.layers.feed_forward import MLP, SwiGLU
from deepseek_jax.layers.norm import LayerNorm, RMSNorm
from deepseek_jax.layers.weights import weight
from deepseek_jax.ops.points import (
  farthest_points,
  local_groups,
  nearest_points,
  take_points,
  within_ball,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Points:
  """An encoder of point clouds in which the order of the points does not count.

  Points that are spread over the cloud are centres; a small network looks at each neighbour of a
  centre, and the largest of what it finds is the centre's token.

  Attributes:
    points: most points P of a cloud; smaller ones are told by their count.
    features: numbers C of each point beside its three coordinates, such as a colour.
    groups: centres G: tokens of the encoder and of the decoder.
    neighbours: points K around each centre.
    radius: of the ball around a centre that neighbours lie in; None takes the nearest, however far.
    hidden: hidden units of the network that looks at neighbours.
    width: channels of the encoder's stream.
    depth: layers.
    attention: attention of every layer; with `rope=Axial()` it knows where centres lie.
    feed_forward: feed-forward of every layer.
    norm: norm before each sublayer and at the end.

  Source: Qi et al., PointNet++, arXiv 1706.02413, section 3.2; tokens of groups: Yu et al.,
    Point-BERT, arXiv 2111.14819, section 3.1.
  """

  width: int
  depth: int
  attention: Bidirectional
  feed_forward: SwiGLU | MLP
  points: int = 256
  features: int = 0
  groups: int = 16
  neighbours: int = 16
  radius: float | None = None
  hidden: int = 64
  norm: RMSNorm | LayerNorm = RMSNorm()

  def __post_init__(self):
    sizes = ('points', 'groups', 'neighbours', 'hidden', 'width', 'depth')
    errors = wrong_sizes(self, sizes)
    errors += [
      f'`{name}` is {size}, more than the {self.points} `points` of a cloud'
      for name in ('groups', 'neighbours')
      if (size := getattr(self, name)) > self.points
    ]
    if self.features < 0:
      errors.append(f'`features` is {self.features}; expected 0 or more')
    if self.radius is not None and not self.radius > 0:
      errors.append(f'`radius` is {self.radius}; expected a number above 0, or None')
    if errors:
      raise ConfigError(errors)

  @property
  def patches(self) -> int:
    """Centres of a cloud: tokens of the encoder."""
    return self.groups

  @property
  def slots(self) -> int:
    """Tokens of the decoder that a cloud takes the place of."""
    return self.groups

  @property
  def medium(self) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a cloud."""
    return (self.points, 3 + self.features), 'float32'

  @property
  def stem_vectors(self) -> dict[str, int]:
    """Vectors that meet a weight of the stem, where they are not `patches`: neighbours."""
    return dict.fromkeys(('first', 'second'), self.groups * self.neighbours)

  def stem(self, dtype: DTypeLike, name: str | None = None) -> nn.Module:
    """Returns the module that makes the encoder's tokens."""
    return PointStem(self, dtype, name=name)

  def join(self, tokens: Tokens) -> Tokens:
    """Returns the tokens [R, G, W] as they are: centres have no neighbours in a grid."""
    return Tokens(tokens.values, tokens.real)


class PointStem(nn.Module):
  """Clouds [R, P, 3 + C] float32 -> tokens [R, G, W], in an order that the points alone decide."""

  config: Points
  dtype: DTypeLike

  @nn.compact
  def __call__(self, clouds: jax.Array, counts: jax.Array) -> Tokens:
    """Embeds `clouds` [R, P, 3 + C], of which `counts` [R] points are real."""
    c, real = self.config, first_real(counts, clouds.shape[1])
    # What is not real may be anything, even not a number.
    clouds = jnp.where(real[..., None], clouds.astype(jnp.float32), 0.0)
    places = clouds[..., :3]
    with jax.named_scope('grouping'):
      chosen = farthest_points(places, real, c.groups)
      centres = take_points(places, chosen)
      indices, squared = nearest_points(centres, places, real, c.neighbours)
      # Beyond the last real point the nearest stands in: the largest of a set with repeats is that
      # of the set.
      indices = within_ball(indices, squared, 1e9 if c.radius is None else c.radius)
      x = local_groups(clouds, chosen, indices).astype(self.dtype)
    for name, size in (('first', c.hidden), ('second', c.width)):
      w = weight(self, name, (x.shape[-1], size), (None, None), dtype=x.dtype)
      x = jnp.einsum('rgkd,df->rgkf', x, w)
      x = jax.nn.gelu(x, approximate=False) if name == 'first' else x
    x = jnp.max(x, axis=2)
    where = weight(self, 'place', (3, c.width), (None, 'embed'), dtype=x.dtype)
    x += jnp.einsum('rgd,df->rgf', centres.astype(x.dtype), where)
    return Tokens(x, first_real(jnp.minimum(counts, c.groups), c.groups), centres)
