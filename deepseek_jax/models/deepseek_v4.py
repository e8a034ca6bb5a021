"""The DeepSeek-V4 family: attention kinds that take turns from layer to layer."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.layers.attention.csa import CSA
from deepseek_jax.layers.attention.hca import HCA
from deepseek_jax.layers.attention.shared_window import SharedWindow
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.hyper_connections import HyperConnections
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.residual import Add
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.mtp import LaneMTP
from deepseek_jax.models.pipeline import Stages
from deepseek_jax.models.plan import Block
from deepseek_jax.models.remat import Remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekV4:
  """A decoder whose layers compress their past by turns lightly and heavily.

  The first layers have an attention of their own; after them, sparse and heavy ones alternate. The
  first feed-forwards may differ from the others too: in the released models they choose experts by
  the token alone.

  Attributes:
    depth: layers L.
    width: channels D of the residual stream.
    vocab: entries V of the vocabulary.
    first: attention of the first layers.
    sparse: attention of every second layer after them, the first of these among them.
    heavy: attention of the others.
    feed_forward: feed-forward of every layer.
    first_layers: how many layers have the attention `first`.
    hashed: feed-forward of the first `hashed_layers` layers, or None.
    hashed_layers: how many these are.
    mtp: multi-token prediction in training, or None.
    residual: how sublayers join the stream.
    norm: norm before each sublayer and at the end.

  Source: DeepSeek-V4, arXiv 2606.19348, section 2; the released `compress_ratios`.
  """

  depth: int
  width: int
  vocab: int
  first: SharedWindow | HCA
  sparse: CSA
  heavy: HCA
  feed_forward: MoE | SwiGLU
  first_layers: int = 2
  hashed: MoE | None = None
  hashed_layers: int = 0
  mtp: LaneMTP | None = None
  residual: HyperConnections | Add = HyperConnections()
  norm: RMSNorm = RMSNorm()

  def __post_init__(self):
    errors = wrong_sizes(self, ('depth', 'width', 'vocab'))
    for name in ('first_layers', 'hashed_layers'):
      if not 0 <= getattr(self, name) <= self.depth:
        errors.append(f'`{name}` is {getattr(self, name)}; expected 0 to `depth` {self.depth}')
    if (self.hashed is None) != (self.hashed_layers == 0):
      given = 'not given' if self.hashed is None else 'given'
      errors.append(f'`hashed` is {given} and `hashed_layers` is {self.hashed_layers}')
    if errors:
      raise ConfigError(errors)

  def layers(self) -> list[Block]:
    """Returns the layers, first to last."""
    turns = (self.sparse, self.heavy)
    rest = [turns[place % 2] for place in range(self.depth - self.first_layers)]
    attentions = [self.first] * self.first_layers + rest
    own = [self.hashed or self.feed_forward] * self.hashed_layers
    feed_forwards = own + [self.feed_forward] * (self.depth - self.hashed_layers)
    return [
      Block(attention=a, feed_forward=f, residual=self.residual, norm=self.norm)
      for a, f in zip(attentions, feed_forwards, strict=True)
    ]

  def build(
    self,
    dtype: DTypeLike = jnp.float32,
    remat: Remat | None = None,
    stages: Stages | None = None,
  ) -> Decoder:
    """Returns the module: tokens [B, T] -> hidden states [B, T, D]."""
    return Decoder(self, dtype, remat, stages)
