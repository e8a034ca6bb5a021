"""Two towers, one of media and one of text, trained to find each other's match."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.encoders.contrast import InfoNCE, SigLIP
from deepseek_jax.layers.weights import add_loss, observe, weight
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.multimodal import Multimodal, MultimodalDecoder
from deepseek_jax.models.pipeline import Stages
from deepseek_jax.models.remat import Remat
from deepseek_jax.models.seeing import encode_media
from deepseek_jax.ops.contrast import Pairs, unit
from deepseek_jax.ops.placeholders import media_places


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrastive(Multimodal):
  """Media and the texts of their documents, each encoded without the other, brought together.

  Each medium of a batch and the text of its document are a pair; all other pairs of the batch, on
  all devices, are the negatives. Media pass their encoder and projection to the shared space; text
  passes the decoder, which does not see the media.

  Attributes:
    text: the decoder that reads text.
    image: the encoder of pictures, or None; and so the others, see `Multimodal`.
    projection: to the space of the text's `width`.
    loss: what is minimised beside the cross-entropy of the text.
    weight: factor on that loss, a mean over the rows of a batch.
    text_weight: factor on the gradient that next-token cross-entropy gives the text's layers; 0
      leaves them to the contrastive loss alone.

  Source: Radford et al., arXiv 2103.00020, section 2.
  """

  loss: InfoNCE | SigLIP = InfoNCE()
  weight: float = 1.0
  text_weight: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    errors = [
      f'`{name}` is {value}; expected 0 or more'
      for name in ('weight', 'text_weight')
      if (value := getattr(self, name)) < 0
    ]
    if self.tiling is not None:
      errors.append('`tiling` is not None; a picture is matched as a whole')
    if errors:
      raise ConfigError(errors)

  def build(
    self,
    dtype: DTypeLike = jnp.float32,
    remat: Remat | None = None,
    stages: Stages | None = None,
  ) -> Decoder:
    """Returns the module: tokens [B, T] and media -> hidden states [B, T, D]."""
    return ContrastiveDecoder(self, dtype, remat, stages)


class Towers(NamedTuple):
  """The two halves of each pair, P a row.

  Attributes:
    media: [B, P, D] float32 of length 1.
    text: [B, P, D] float32 of length 1.
    real: [B, P] bool.
  """

  media: jax.Array
  text: jax.Array
  real: jax.Array


class ContrastiveDecoder(MultimodalDecoder):
  """Tokens [B, T] and media [B, M, …] -> hidden states [B, T, D] of the text; and a loss."""

  config: Contrastive

  def setup(self):
    """Declares the parts."""
    super().setup()
    self.contrast = self.config.loss.build()
    shape = (self.config.width, self.config.width)
    self.text_head = weight(self, 'text_head', shape, ('embed', None), dtype=self.dtype)

  def embed(self, tokens: jax.Array, context: Context) -> jax.Array:
    """Returns embeddings [B, T, D] of tokens alone."""
    return Decoder.embed(self, tokens, context)

  @nn.nowrap
  def inner(self, context: Context) -> Context:
    """Returns the context of the stack, in which the places [B, T] of media are padding."""
    if context.placeholders is None:
      return context
    segments = jnp.where(context.placeholders == -1, context.segments, 0)
    return dataclasses.replace(context, segments=segments, media=None, placeholders=None)

  def every_depth(self, context: Context) -> list[jax.Array]:
    """Returns the hidden states [B, T, D] of the text; reports the contrastive loss."""
    stream, _ = self.run(context)
    hidden = self.finish(stream)
    if context.media is not None and context.placeholders is not None:
      towers = self.towers(hidden, context)
      flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
      pairs = Pairs(*(flat(x) for x in towers))
      losses = self.contrast(pairs, context.rules)
      add_loss(self, 'contrast', self.config.weight * jnp.sum(losses))
      observe(
        self, 'contrast', {'nats': jnp.sum(losses), 'pairs': jnp.sum(pairs.real, dtype=jnp.float32)}
      )
    share = self.config.text_weight
    return [share * hidden + jax.lax.stop_gradient((1 - share) * hidden)]

  def towers(self, hidden: jax.Array, context: Context) -> Towers:
    """Returns both halves of every pair, of hidden states [B, T, D] of the text."""
    media = encode_media(self, context)
    assert context.placeholders is not None  # only rows with media are matched
    spans = [(span.media, span.slots) for span in media.spans]
    places = media_places(context.placeholders, context.positions, context.segments, spans)
    shown, segments, real = [], [], []
    start = 0
    for count, slots in spans:
      stop = start + count * slots
      cut = lambda x, s=start, e=stop, n=count: x[:, s:e].reshape(x.shape[0], n, -1, *x.shape[2:])  # noqa: E731
      own = cut(media.real)[..., None].astype(jnp.float32)
      values = cut(media.values).astype(jnp.float32)
      shown.append(jnp.sum(values * own, axis=2) / jnp.maximum(jnp.sum(own, axis=2), 1.0))
      segments.append(cut(places.segments)[:, :, 0])
      real.append(jnp.any(own[..., 0] > 0, axis=2))
      start = stop
    segment = jnp.concatenate(segments, axis=1)
    words = jnp.where(context.placeholders == -1, context.segments, 0)
    inside = ((words[:, None] == segment[..., None]) & (words[:, None] > 0)).astype(jnp.float32)
    total = jnp.einsum('bpt,btd->bpd', inside, hidden.astype(jnp.float32))
    text = total / jnp.maximum(jnp.sum(inside, axis=-1, keepdims=True), 1.0)
    text = jnp.einsum('bpd,de->bpe', text, self.text_head.astype(jnp.float32))
    there = jnp.concatenate(real, axis=1) & (segment > 0) & (jnp.sum(inside, axis=-1) > 0)
    return Towers(unit(jnp.concatenate(shown, axis=1)), unit(text), there)

  def pairs(self, context: Context) -> Towers:
    """Returns both halves of every pair of rows [B, T]: for retrieval and matching."""
    return self.towers(self.finish(self.run(context)[0]), context)
