"""One decoder that reads pictures beside tokens."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.context import IMAGE, TEXT, Context
from deepseek_jax.layers.encoders.patch import Patch2D
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.encoder import Encoder
from deepseek_jax.models.mtp import MTP
from deepseek_jax.models.pipeline import Stages
from deepseek_jax.models.plan import Block
from deepseek_jax.models.remat import Remat
from deepseek_jax.ops.patch import place_media


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multimodal:
  """A decoder of text in whose rows embeddings of pictures take the place of tokens.

  Attributes:
    text: the decoder; pictures and words go through the same layers and experts.
    image: the encoder of pictures.

  Source: DeepSeek-VL2, arXiv 2412.10302, section 2.
  """

  text: DeepSeekV3
  image: Patch2D

  def __post_init__(self):
    if self.text.mtp is not None:
      raise ConfigError(
        '`text.mtp` is not None; looking ahead at tokens is not defined where a picture stands'
      )

  @property
  def width(self) -> int:
    """Channels D of the residual stream."""
    return self.text.width

  @property
  def vocab(self) -> int:
    """Entries V of the vocabulary."""
    return self.text.vocab

  @property
  def mtp(self) -> MTP | None:
    """No multi-token prediction."""
    return None

  def layers(self) -> list[Block]:
    """Returns the layers of the decoder, first to last."""
    return self.text.layers()

  def build(
    self,
    dtype: DTypeLike = jnp.float32,
    remat: Remat | None = None,
    stages: Stages | None = None,
  ) -> Decoder:
    """Returns the module: tokens [B, T] and pictures -> hidden states [B, T, D]."""
    return MultimodalDecoder(self, dtype, remat, stages)


class MultimodalDecoder(Decoder):
  """Tokens [B, T] and pictures [B, M, S, S, 3] -> hidden states [B, T, D].

  Pictures come in `context.images`, and `context.placeholders` says where they stand. Without
  pictures, as when a caption goes on token by token, it is a decoder of text.
  """

  config: Multimodal

  def setup(self):
    """Declares the parts."""
    super().setup()
    self.image = Encoder(self.config.image, self.config.width, self.dtype, self.remat)

  def embed(self, tokens: jax.Array, context: Context) -> jax.Array:
    """Returns embeddings [B, T, D], those of pictures at their placeholders."""
    x = super().embed(tokens, context)
    if context.images is None or context.placeholders is None:
      return x
    batch, count = context.images.shape[:2]
    images = context.images.reshape(batch * count, *context.images.shape[2:])
    media = self.image(images, context.rules).reshape(batch, -1, x.shape[-1])
    x = place_media(x, media, context.placeholders)
    return context.rules.constrain(x, ('batch', 'seq', 'act_embed'))

  def run(self, context: Context, caches: Any = None) -> tuple[jax.Array, Any]:
    """Returns the residual stream [B, T, …] after the last layer, and the caches."""
    stream = self.open.open(self.embed(context.tokens, context))
    return self.stack(stream, without_images(context), caches)

  def everything(self, context: Context) -> jax.Array:
    """Runs every part once on tokens [B, T] and empty pictures, so that `init` declares all."""
    batch, size = context.tokens.shape[0], self.config.image.size
    context = dataclasses.replace(
      context,
      images=jnp.zeros((batch, 1, size, size, 3), jnp.uint8),
      placeholders=jnp.zeros_like(context.tokens),
    )
    return super().everything(context)


def without_images(context: Context) -> Context:
  """Returns the context of the stack: which tokens [B, T] are pictures, but no pixels."""
  if context.placeholders is None:
    return context
  modality = jnp.where(context.placeholders >= 0, IMAGE, TEXT)
  return dataclasses.replace(context, images=None, placeholders=None, modality=modality)
