"""Hyper-connections: a residual stream of several lanes that every sublayer mixes."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.weights import vector, weight
from deepseek_jax.ops.hyper_connections import (
  collapse,
  head_mix,
  lane_logits,
  site_mixes,
  spread,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HyperConnections:
  """Manifold-constrained hyper-connections (mHC): lanes that tokens mix as they need.

  A sublayer reads a weighted sum of the lanes; its output is added to each lane by a weight, after
  the lanes were mixed by a matrix whose rows and columns sum to 1. All weights are made of the
  token's own lanes.

  A model starts as the plain residual would, but for `gate`: the embedding stands in every lane, a
  sublayer reads their mean, writes 1 to each, and `keep` of a lane stays in it. As long as lanes
  are equal, what they are mixed by changes nothing. The random part, `gate` times numbers of size
  1, is what makes lanes differ.

  Attributes:
    lanes: lanes R.
    iterations: Sinkhorn iterations.
    epsilon: floor of reading weights, and of divisors, that of the norm over all lanes among them.
    gate: factor, at first, on what the weights owe to the token.
    keep: share, at first, of a lane that stays in it, in (0, 1).

  Source: mHC, arXiv 2512.24880, sections 4.1 and 4.2 (0.01 is its first gate); DeepSeek-V4,
    arXiv 2606.19348, section 2.2. Static weights that begin as the plain residual:
    hyper-connections, arXiv 2409.19606, section 2.3.
  """

  lanes: int = 4
  iterations: int = 20
  epsilon: float = 1e-6
  gate: float = 0.01
  keep: float = 0.9

  def __post_init__(self):
    errors = []
    if self.lanes < 2:
      errors.append(f'`lanes` is {self.lanes}; expected 2 or more, or the residual `Add`')
    if self.iterations < 1:
      errors.append(f'`iterations` is {self.iterations}; expected 1 or more')
    if not self.epsilon > 0:
      errors.append(f'`epsilon` is {self.epsilon}; expected a number above 0')
    if not self.gate > 0:
      errors.append(f'`gate` is {self.gate}; at 0 lanes would stay equal for ever')
    if not 0 < self.keep < 1:
      errors.append(f'`keep` is {self.keep}; expected a share above 0 and below 1')
    if errors:
      raise ConfigError(errors)

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return HyperResidual(self, name=name)

  @property
  def stream_axes(self) -> tuple[str, ...]:
    """Logical axes of the stream [B, T, R, D]."""
    return ('batch', 'seq', 'lanes', 'act_embed')

  def mixing_flops(self, width: int) -> float:
    """Forward FLOPs a token of one sublayer's reading and writing; making the weights is apart."""
    return 2.0 * width * self.lanes * (self.lanes + 2)


class HyperResidual(nn.Module):
  """Reads and mixes a stream [B, T, R, D]."""

  config: HyperConnections

  def setup(self):
    """Names the parts; only those that are called have weights."""
    self.mixer = LaneMixer(self.config)
    self.head = LaneHead(self.config)

  def open(self, x: jax.Array) -> jax.Array:
    """Makes the stream [B, T, R, D] from embeddings [B, T, D]: each lane holds them."""
    lanes = self.config.lanes
    return jnp.broadcast_to(x[:, :, None], (*x.shape[:2], lanes, x.shape[2]))

  def read(self, stream: jax.Array) -> tuple[jax.Array, Any]:
    """Returns the sublayer's input [B, T, D] and the weights that `write` takes."""
    with jax.named_scope('read_lanes'):
      mixes = self.mixer(stream)
      return collapse(stream, mixes.read), (mixes.write, mixes.carry)

  def write(self, stream: jax.Array, y: jax.Array, mix: Any) -> jax.Array:
    """Mixes the lanes and adds a sublayer's output `y` [B, T, D] to each."""
    with jax.named_scope('write_lanes'):
      return spread(stream, y, *mix)

  def close(self, stream: jax.Array) -> jax.Array:
    """Collapses the stream to [B, T, D] by weights of its own."""
    return collapse(stream, self.head(stream))


class LaneMixer(nn.Module):
  """All mixing weights of one sublayer, from one product."""

  config: HyperConnections

  @nn.compact
  def __call__(self, stream: jax.Array) -> Any:
    """Returns the `Mixes` of a stream [B, T, R, D]."""
    c = self.config
    base = np.zeros(c.lanes * (c.lanes + 2), np.float32)
    base[: c.lanes] = _mean_read(c.lanes)
    others = (1 - c.keep) / (c.lanes - 1)
    base[2 * c.lanes :] = np.eye(c.lanes).reshape(-1) * math.log(c.keep / others)
    logits = _logits(self, stream, len(base))
    gates = vector(self, 'gates', np.full(3, c.gate, np.float32))
    return site_mixes(logits, vector(self, 'base', base), gates, c.iterations, c.epsilon)


class LaneHead(nn.Module):
  """The weights that collapse the stream after the last layer."""

  config: HyperConnections

  @nn.compact
  def __call__(self, stream: jax.Array) -> jax.Array:
    """Returns the weight of each lane [B, T, R] float32 of a stream [B, T, R, D]."""
    c = self.config
    logits = _logits(self, stream, c.lanes)
    base = vector(self, 'base', np.full(c.lanes, _mean_read(c.lanes), np.float32))
    gate = vector(self, 'gates', np.full(1, c.gate, np.float32))
    return head_mix(logits, base, gate, c.epsilon)


def _mean_read(lanes: int) -> float:
  """The logit of 1 / R."""
  return -math.log(lanes - 1)


def _logits(module: Any, stream: jax.Array, outputs: int) -> jax.Array:
  # The lanes are one vector: the norm is over all of it, and the matrix one for Muon too.
  size = stream.shape[2] * stream.shape[3]
  matrix = weight(module, 'matrix', (size, outputs), ('embed', None), dtype=jnp.float32)
  return lane_logits(stream, matrix, module.config.epsilon)
