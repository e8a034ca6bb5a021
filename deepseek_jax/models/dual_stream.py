"""Text and media in two streams that attend to each other."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.layers.attention.bidirectional import Bidirectional
from deepseek_jax.layers.attention.cross import OrderedCross
from deepseek_jax.layers.attention.fusion import Fusion
from deepseek_jax.layers.context import Context, Memory
from deepseek_jax.layers.feed_forward import MLP, SwiGLU
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.multimodal import Multimodal, MultimodalDecoder
from deepseek_jax.models.pipeline import Stages
from deepseek_jax.models.plan import Block
from deepseek_jax.models.remat import Remat
from deepseek_jax.models.seeing import Encoded, encode_media, span_modalities
from deepseek_jax.models.stack import TransformerBlock
from deepseek_jax.ops.placeholders import Places, media_places


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaStream:
  """The layers of media beside those of text.

  In each, the embeddings of a medium attend to each other, and then to the words before the medium:
  a question, but never an answer.

  Attributes:
    depth: layers.
    attention: of the embeddings of a medium to each other.
    cross: of the embeddings to the words.
    feed_forward: after each attention.
  """

  attention: Bidirectional
  cross: OrderedCross
  feed_forward: SwiGLU | MLP
  depth: int = 1

  def __post_init__(self):
    errors = wrong_sizes(self, ('depth',))
    if self.attention.rope is not None:
      errors.append('`attention.rope`: embeddings of media have no places any more; expected None')
    if errors:
      raise ConfigError(errors)

  def layers(self) -> list[Block]:
    """Returns the layers, first to last, those to itself and those to the words in turn."""
    pair = [
      Block(attention=attention, feed_forward=self.feed_forward)
      for attention in (self.attention, self.cross)
    ]
    return pair * self.depth


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualStream(Multimodal):
  """A decoder of text that attends to media in a stream of their own.

  No medium takes the place of a token: a placeholder only says where in the text it is, one for
  each medium is enough, and the words from there on attend to it. Nothing depends on later words,
  so that rows are packed and captions are generated as in any decoder.

  Attributes:
    text: the decoder.
    image: the encoder of pictures, or None; and so the others, see `Multimodal`.
    projection: how what encoders make comes to the decoder's width.
    tiling: how large pictures are seen closer, or None.
    cross: how words attend to media; `Fusion` weighs the modalities by the question.
    every: layers of text before each layer that attends to media.
    media: layers of the media's own stream, or None for what the encoders make.

  Source: two streams with attention across: Lu et al., arXiv 1908.02265, section 3.1; layers to
    media between layers of a causal decoder: Alayrac et al., arXiv 2204.14198, section 2.2.
  """

  cross: OrderedCross | Fusion
  media: MediaStream | None = None
  every: int = 2

  def __post_init__(self):
    super().__post_init__()
    errors = wrong_sizes(self, ('every',))
    if errors:
      raise ConfigError(errors)

  def layers(self) -> list[Block]:
    """Returns the layers of the text, those that attend to media among them."""
    text, result = self.text, []
    across = Block(
      attention=self.cross, feed_forward=text.dense, residual=text.residual, norm=text.norm
    )
    for number, layer in enumerate(text.layers(), start=1):
      result.append(layer)
      if number % self.every == 0 or (number == text.depth and number < self.every):
        result.append(across)
    return result

  def build(
    self,
    dtype: DTypeLike = jnp.float32,
    remat: Remat | None = None,
    stages: Stages | None = None,
  ) -> Decoder:
    """Returns the module: tokens [B, T] and media -> hidden states [B, T, D]."""
    return DualStreamDecoder(self, dtype, remat, stages)


class DualStreamDecoder(MultimodalDecoder):
  """Tokens [B, T] and media [B, M, …] -> hidden states [B, T, D].

  With caches, media are given with the first tokens of a row; later ones remember them.
  """

  config: DualStream

  def setup(self):
    """Declares the parts."""
    super().setup()
    stream = self.config.media
    self.beside = [] if stream is None else [TransformerBlock(b) for b in stream.layers()]

  def embed(self, tokens: jax.Array, context: Context) -> jax.Array:
    """Returns embeddings [B, T, D] of tokens alone."""
    return Decoder.embed(self, tokens, context)

  def run(self, context: Context, caches: Any = None) -> tuple[jax.Array, Any]:
    """Returns the residual stream [B, T, …] after the last layer, and the caches."""
    words = self.embed(context.tokens, context)
    inner = self.inner(context)
    if context.media is not None and context.placeholders is not None:
      inner = dataclasses.replace(inner, memory=self.memory(words, context))
    elif caches is None:
      # Text alone sees a memory of nothing.
      inner = dataclasses.replace(inner, memory=nothing(words))
    return self.stack(self.open.open(words), inner, caches)

  def memory(self, words: jax.Array, context: Context) -> Memory:
    """Returns what the words attend to, of embeddings [B, T, D] of the words and of media."""
    media = encode_media(self, context)
    assert context.placeholders is not None  # only rows with media have a memory
    places = media_places(
      context.placeholders,
      context.positions,
      context.segments,
      [(span.media, span.slots) for span in media.spans],
    )
    x = self.beside_words(words, media, places, context)
    modality = jnp.broadcast_to(span_modalities(media.spans), media.real.shape)
    # Rows without a medium have a segment of 0 there.
    segments = jnp.where(media.real, places.segments, 0)
    return Memory(x, places.last, segments, modality)

  def beside_words(
    self, words: jax.Array, media: Encoded, places: Places, context: Context
  ) -> jax.Array:
    """Runs the media's own layers: [B, S, D] to [B, S, D]."""
    x = media.values
    text = Memory(
      words,
      context.positions,
      jnp.where(context.placeholders == -1, context.segments, 0),
    )
    alone = Context(
      tokens=jnp.zeros_like(places.first),
      positions=places.first,
      segments=jnp.where(media.real, places.numbers, 0),
      rules=context.rules,
    )
    asked = dataclasses.replace(
      alone, segments=jnp.where(media.real, places.segments, 0), memory=text
    )
    for number, block in enumerate(self.beside):
      x, _ = block(x, asked if number % 2 else alone)
    return x


def nothing(words: jax.Array) -> Memory:
  """Returns a memory of one vector that nobody sees, for words [B, T, D]."""
  batch, _, width = words.shape
  zeros = jnp.zeros((batch, 1), jnp.int32)
  return Memory(jnp.zeros((batch, 1, width), words.dtype), zeros, zeros, zeros)
