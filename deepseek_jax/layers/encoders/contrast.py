"""Contrastive losses as kinds, with the negatives of all devices."""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.weights import vector
from deepseek_jax.ops.contrast import Pairs, info_nce, sigmoid_pairs
from deepseek_jax.sharding.rules import Rules, shard_count

SMALLEST_TEMPERATURE = 0.01
"""The learned temperature goes no lower: CLIP's bound."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardNegatives:
  """Negatives count by how near they are.

  Attributes:
    hardness: 0 would be all alike; a negative nearer by 1 / hardness counts e times as much.

  Source: Robinson et al., arXiv 2010.04592, section 3.
  """

  hardness: float = 1.0

  def __post_init__(self):
    if not self.hardness > 0:
      raise ConfigError(f'`hardness` is {self.hardness}; expected more than 0, or no HardNegatives')


def _check(temperature: float) -> None:
  if not temperature >= SMALLEST_TEMPERATURE:
    raise ConfigError(f'`temperature` is {temperature}; expected at least {SMALLEST_TEMPERATURE}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfoNCE:
  """Each half of a pair is to find the other among all of the batch: symmetric cross-entropy.

  Attributes:
    temperature: of the similarities at first; it is learned.
    negatives: makes near ones count for more, or None.

  Source: Radford et al., arXiv 2103.00020, section 2.3.
  """

  temperature: float = 0.07
  negatives: HardNegatives | None = None

  def __post_init__(self):
    _check(self.temperature)

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return InfoNCELoss(self, name=name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigLIP:
  """Of every pair of halves it is to be said whether they belong together.

  Attributes:
    temperature: of the similarities at first; it is learned.
    offset: added to the similarities at first; it is learned. Nearly all pairs are none.
    negatives: makes near ones count for more, or None.

  Source: Zhai et al., arXiv 2303.15343, section 3.2.
  """

  temperature: float = 0.1
  offset: float = -10.0
  negatives: HardNegatives | None = None

  def __post_init__(self):
    _check(self.temperature)

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return SigLIPLoss(self, name=name)


class InfoNCELoss(nn.Module):
  """Pairs [N, K] -> [N] float32 nats."""

  config: InfoNCE

  @nn.compact
  def __call__(self, pairs: Pairs, rules: Rules) -> jax.Array:
    """Returns the loss of every pair among all of the batch."""
    c = self.config
    hardness = 0.0 if c.negatives is None else c.negatives.hardness

    def loss(mine, every, places, scale):
      return info_nce(mine, every, places, scale, hardness)

    return among_all(loss, pairs, rules, learned_scale(self, c.temperature))


class SigLIPLoss(nn.Module):
  """Pairs [N, K] -> [N] float32 nats."""

  config: SigLIP

  @nn.compact
  def __call__(self, pairs: Pairs, rules: Rules) -> jax.Array:
    """Returns the loss of every pair with all of the batch."""
    c = self.config
    hardness = 0.0 if c.negatives is None else c.negatives.hardness
    offset = vector(self, 'offset', np.full(1, c.offset))[0]

    def loss(mine, every, places, scale, offset):
      return sigmoid_pairs(mine, every, places, scale, offset, hardness)

    return among_all(loss, pairs, rules, learned_scale(self, c.temperature), offset)


def learned_scale(module: nn.Module, temperature: float) -> jax.Array:
  """Declares the logarithm of an inverse temperature, and returns its exponential [] float32."""
  log_scale = vector(module, 'log_scale', np.full(1, -math.log(temperature)))[0]
  return jnp.exp(jnp.minimum(log_scale, -math.log(SMALLEST_TEMPERATURE)))


def among_all(
  loss: Callable[..., jax.Array], pairs: Pairs, rules: Rules, *scalars: jax.Array
) -> jax.Array:
  """Runs a loss over the pairs [N, K], each device its own against those of all devices.

  Args:
    loss: `(mine, every, places, *scalars) -> [n]`.
    pairs: of the whole batch, spread over devices as its rows are.
    rules: how rows lie on the mesh.
    scalars: [] learned numbers.

  Returns:
    [N] float32.
  """
  mesh, count = jax.sharding.get_abstract_mesh(), pairs.real.shape[0]
  # Inside of another `shard_map` its axes have been dealt with.
  free = [] if mesh.empty else [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]
  axes = tuple(axis for axis in rules.batch if axis in free)
  if mesh.empty or mesh.size == 1 or count % shard_count(axes, dict(mesh.shape)):
    return loss(pairs, pairs, jnp.arange(count), *scalars)

  def shard(mine, *scalars):
    gather = lambda x: jax.lax.all_gather(x, axes, tiled=True) if axes else x  # noqa: E731
    every = jax.tree.map(gather, mine)
    own = mine.real.shape[0]
    start = jax.lax.axis_index(axes) * own if axes else 0
    return loss(mine, every, start + jnp.arange(own), *scalars)

  rows = PartitionSpec(axes or None)
  return jax.shard_map(
    shard,
    in_specs=(Pairs(rows, rows, rows), *(PartitionSpec() for _ in scalars)),  # type: ignore[arg-type]
    out_specs=rows,
    axis_names=set(free),
    check_vma=False,
  )(pairs, *scalars)
