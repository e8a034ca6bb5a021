"""One decoder that reads pictures, clips, sounds and points beside tokens."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError, did_you_mean
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.encoders.line import Text1D, Waveform
from deepseek_jax.layers.encoders.patch import Patch2D, Patch3D
from deepseek_jax.layers.encoders.points import Points
from deepseek_jax.layers.encoders.projection import SeparateProjection, SharedProjection
from deepseek_jax.layers.encoders.tiling import EveryTile, Progressive
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.encoder import AnyEncoder
from deepseek_jax.models.mtp import MTP
from deepseek_jax.models.pipeline import Stages
from deepseek_jax.models.plan import Block
from deepseek_jax.models.remat import Remat
from deepseek_jax.models.seeing import (
  declare_encoders,
  declared_encoders,
  encode_media,
  example,
  sight_faults,
  without_media,
)
from deepseek_jax.ops.patch import place_media


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multimodal:
  """A decoder of text in whose rows embeddings of media take the place of tokens.

  Media of any kind may stand anywhere in a document, in any number and order, and documents are
  packed with others as text is. An encoder of a kind that a batch has none of does not run.

  Attributes:
    text: the decoder; media and words go through the same layers and experts.
    image: the encoder of pictures, or None; and so the others.
    video: of clips.
    sound: of sounds.
    points: of point clouds.
    passage: of text that is not the row's own.
    projection: how what encoders make comes to the decoder's width.
    tiling: how large pictures are seen closer, or None.

  Source: DeepSeek-VL2, arXiv 2412.10302, section 2.
  """

  text: DeepSeekV3
  image: Patch2D | None = None
  video: Patch3D | None = None
  sound: Waveform | None = None
  points: Points | None = None
  passage: Text1D | None = None
  projection: SharedProjection | SeparateProjection = SharedProjection()
  tiling: EveryTile | Progressive | None = None

  def __post_init__(self):
    errors = sight_faults(self)
    if self.text.mtp is not None:
      errors.append(
        '`text.mtp` is not None; looking ahead at tokens is not defined where a picture stands'
      )
    if errors:
      raise ConfigError(errors)

  @property
  def encoders(self) -> dict[str, AnyEncoder]:
    """The encoder of each kind of media, in the order of their embeddings in a row."""
    return declared_encoders(self)

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

  def check_media(self, media: Mapping[str, tuple[tuple[int, ...], str, int]]) -> list[str]:
    """Returns what is wrong between the media of a data set and the encoders, as messages.

    Args:
      media: by kind, shape and dtype of a medium, and how many tokens it takes the place of.
    """
    encoders, errors = self.encoders, []
    for kind, (shape, dtype, slots) in media.items():
      if kind not in encoders:
        near = did_you_mean(kind, encoders)
        errors.append(f'data has media of kind `{kind}`, of which the model has no encoder{near}')
        continue
      field, encoder = 'image' if kind == 'tile' else kind, encoders[kind]
      if (tuple(shape), dtype) != encoder.medium:
        wanted = ' '.join(map(str, encoder.medium))
        errors.append(f'model.{field} reads {wanted}, but `{kind}` of data is {shape} {dtype}')
      if slots != encoder.slots:
        errors.append(
          f'`{kind}` of data takes {slots} slots, but model.{field} makes {encoder.slots}'
        )
    return errors

  def build(
    self,
    dtype: DTypeLike = jnp.float32,
    remat: Remat | None = None,
    stages: Stages | None = None,
  ) -> Decoder:
    """Returns the module: tokens [B, T] and media -> hidden states [B, T, D]."""
    return MultimodalDecoder(self, dtype, remat, stages)


class MultimodalDecoder(Decoder):
  """Tokens [B, T] and media [B, M, …] -> hidden states [B, T, D].

  Media come in `context.media`, and `context.placeholders` says where they stand. Without media, as
  when a caption goes on token by token, it is a decoder of text.
  """

  config: Multimodal

  def setup(self):
    """Declares the parts."""
    super().setup()
    declare_encoders(self, self.config.width, self.dtype, self.remat)

  def embed(self, tokens: jax.Array, context: Context) -> jax.Array:
    """Returns embeddings [B, T, D], those of media at their placeholders."""
    x = super().embed(tokens, context)
    if context.media is None or context.placeholders is None:
      return x
    media = encode_media(self, context)
    marks = () if self.config.tiling is None else self.view.marks()
    x = place_media(x, media.values, context.placeholders, marks)
    return context.rules.constrain(x, ('batch', 'seq', 'act_embed'))

  @nn.nowrap
  def inner(self, context: Context) -> Context:
    """Returns the context of the stack: of which modality tokens [B, T] are, but no media."""
    return without_media(self.config, context)

  def everything(self, context: Context) -> jax.Array:
    """Runs every part once on tokens [B, T] and empty media, so that `init` declares all."""
    return super().everything(example(self, context))
