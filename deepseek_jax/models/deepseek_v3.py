"""The DeepSeek-V3 family."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.layers.attention.csa import CSA
from deepseek_jax.layers.attention.gated import Gated
from deepseek_jax.layers.attention.hca import HCA
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.mha import MHA
from deepseek_jax.layers.attention.nsa import NSA
from deepseek_jax.layers.attention.recurrent import Recurrent
from deepseek_jax.layers.attention.shared_window import SharedWindow
from deepseek_jax.layers.attention.sparse import DSA
from deepseek_jax.layers.attention.top_k import ModalityTopK, TopK
from deepseek_jax.layers.attention.window import Window
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.hyper_connections import HyperConnections
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.residual import Add
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.mtp import MTP
from deepseek_jax.models.pipeline import Stages
from deepseek_jax.models.plan import Block
from deepseek_jax.models.remat import Remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekV3:
  """A decoder with latent attention and, after a few dense layers, mixtures of experts.

  Attributes:
    depth: layers L.
    width: channels D of the residual stream.
    vocab: entries V of the vocabulary.
    attention: attention of every layer.
    feed_forward: feed-forward of the layers after the dense ones.
    dense: feed-forward of the first layers.
    dense_layers: how many layers at the start are dense.
    mtp: multi-token prediction in training, or None.
    residual: how sublayers join the stream.
    norm: norm before each sublayer and at the end.

  Source: DeepSeek-V3, arXiv 2412.19437, section 2.
  """

  depth: int
  width: int
  vocab: int
  attention: (
    MLA
    | MHA
    | Window
    | Gated
    | TopK
    | DSA
    | NSA
    | Recurrent
    | SharedWindow
    | HCA
    | CSA
    | ModalityTopK
  )
  feed_forward: MoE | SwiGLU
  dense: SwiGLU
  dense_layers: int = 1
  mtp: MTP | None = None
  residual: Add | HyperConnections = Add()
  norm: RMSNorm = RMSNorm()

  def __post_init__(self):
    errors = wrong_sizes(self, ('depth', 'width', 'vocab'))
    if not 0 <= self.dense_layers <= self.depth:
      errors.append(f'`dense_layers` is {self.dense_layers}; expected 0 to `depth` {self.depth}')
    if errors:
      raise ConfigError(errors)

  def layers(self) -> list[Block]:
    """Returns the layers, first to last."""

    def block(feed_forward):
      return Block(
        attention=self.attention,
        feed_forward=feed_forward,
        residual=self.residual,
        norm=self.norm,
      )

    sparse = self.depth - self.dense_layers
    return [block(self.dense)] * self.dense_layers + [block(self.feed_forward)] * sparse

  def build(
    self,
    dtype: DTypeLike = jnp.float32,
    remat: Remat | None = None,
    stages: Stages | None = None,
  ) -> Decoder:
    """Returns the module: tokens [B, T] -> hidden states [B, T, D]."""
    return Decoder(self, dtype, remat, stages)
