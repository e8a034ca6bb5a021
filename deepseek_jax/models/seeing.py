"""Encoders of several kinds of media in front of a model, and what it needs to know of them."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.config import ConfigError, did_you_mean
from deepseek_jax.layers.context import IMAGE, MEDIA, TEXT, Context, Media
from deepseek_jax.layers.encoders.tiling import EveryTile, Progressive, Whole
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.encoder import AnyEncoder, AnyProjection, Encoder, no_media
from deepseek_jax.models.remat import Remat


class Span(NamedTuple):
  """Where the embeddings of one kind of media lie in a row.

  Attributes:
    kind: one of `MEDIA`.
    media: how many M a row has.
    slots: embeddings of each.
  """

  kind: str
  media: int
  slots: int


class Encoded(NamedTuple):
  """All embeddings of the media of each row.

  Attributes:
    values: [B, S, D].
    real: [B, S] bool, False where there is no medium, or where it ended before.
    spans: what the S are, in order.
  """

  values: jax.Array
  real: jax.Array
  spans: tuple[Span, ...]


class Sighted(Protocol):
  """What the config of a model with encoders offers."""

  @property
  def encoders(self) -> dict[str, AnyEncoder]:
    """The encoder of each kind of media, in the order of `MEDIA`."""

  @property
  def projection(self) -> AnyProjection:
    """How what they make comes to the model's width."""

  @property
  def tiling(self) -> EveryTile | Progressive | None:
    """How large pictures are seen closer."""


def declared_encoders(config: Any) -> dict[str, AnyEncoder]:
  """Returns the encoder of each kind of media that a config has a field for, in order.

  Tiles are read by the encoder of pictures, where there is a tiling.
  """
  found = {kind: getattr(config, 'image' if kind == 'tile' else kind) for kind in MEDIA}
  if config.tiling is None:
    del found['tile']
  return {kind: encoder for kind, encoder in found.items() if encoder is not None}


def sight_faults(config: Any) -> list[str]:
  """Returns what is wrong between the encoders of a config, as messages."""
  if not any(getattr(config, kind, None) is not None for kind in MEDIA):
    kinds = ', '.join(kind for kind in MEDIA if kind != 'tile')
    return [f'there is no encoder; expected at least one of {kinds}']
  if config.tiling is not None and config.image is None:
    return ['`tiling` is of pictures, but `image` is None']
  return []


def media_spans(config: Sighted, media: Mapping[str, Media]) -> tuple[Span, ...]:
  """Returns which media the embeddings of a row are of, from their arrays [B, M, …] alone.

  Raises:
    ConfigError: there are media of a kind that the model has no encoder of.
  """
  encoders = config.encoders
  for kind in media:
    if kind not in encoders:
      raise ConfigError(
        f'context.media has `{kind}`, but the model has no encoder of it; it has '
        f'{", ".join(encoders)}{did_you_mean(kind, encoders)}'
      )
  result = []
  for kind, encoder in encoders.items():
    if kind in media:
      count = media[kind].counts.shape[1]
      if kind == 'tile' and isinstance(config.tiling, Progressive):
        count = min(count, config.tiling.tiles)
      result.append(Span(kind, count, encoder.slots))
  return tuple(result)


def span_modalities(spans: tuple[Span, ...]) -> np.ndarray:
  """Returns the modality of every embedding of a row, [S] int32."""
  counts = [span.media * span.slots for span in spans]
  return np.repeat(np.array([MEDIA[span.kind] for span in spans], np.int32), counts)


def without_media(config: Sighted, context: Context) -> Context:
  """Returns the context of the stack: of which modality tokens [B, T] are, but no media."""
  if context.placeholders is None:
    return context
  table = np.array([IMAGE], np.int32)
  if context.media is not None:
    table = span_modalities(media_spans(config, context.media))
  modality = jnp.asarray(table)[jnp.clip(context.placeholders, 0, len(table) - 1)]
  # What is below -1 marks the lines of a picture.
  modality = jnp.where(context.placeholders < -1, IMAGE, modality)
  modality = jnp.where(context.placeholders == -1, TEXT, modality)
  return dataclasses.replace(context, media=None, placeholders=None, modality=modality)


def declare_encoders(decoder: Any, width: int, dtype: Any, remat: Remat | None) -> None:
  """Makes the encoders in the `setup` of a model: `image`, `video` … and what they share."""
  config = decoder.config
  for kind, encoder in config.encoders.items():
    if kind != 'tile':
      setattr(decoder, kind, Encoder(encoder, width, dtype, remat, config.projection))
  joint = config.projection.joint(width)
  if joint is not None:
    decoder.shared = joint
  if config.tiling is not None:
    decoder.view = config.tiling.build(width)


def encode_media(decoder: Any, context: Context) -> Encoded:
  """Encodes the media of every row.

  Args:
    decoder: a module that `declare_encoders` was called in.
    context: with media [B, M, …].
  """
  config, media = decoder.config, dict(context.media or {})
  spans, values, real = media_spans(config, media), [], []
  whole: Whole | None = None
  for span in spans:
    given, chosen = media[span.kind], None
    if span.kind == 'tile':
      given, chosen = decoder.view.choose(given, whole, span.media)
    encoder = getattr(decoder, 'image' if span.kind == 'tile' else span.kind)
    x, shown = encoder(given, context.rules)
    if hasattr(decoder, 'shared'):
      x = decoder.shared(x)
    if chosen is not None:
      x = decoder.view.weigh(x, chosen)
    if span.kind == 'image':
      whole = Whole(x, shown, math.isqrt(span.slots))
    values.append(x)
    real.append(shown)
  return Encoded(jnp.concatenate(values, axis=1), jnp.concatenate(real, axis=1), spans)


def example(decoder: Decoder, context: Context) -> Context:
  """Returns the context [B, T] with empty media of every kind, so that `init` declares all."""
  config: Any = decoder.config
  rows = context.tokens.shape[0]
  media = {kind: no_media(encoder, rows) for kind, encoder in config.encoders.items()}
  if 'tile' in media:
    media['tile'] = dataclasses.replace(media['tile'], boxes=jnp.zeros((rows, 1, 5)))
  return dataclasses.replace(context, media=media, placeholders=jnp.zeros_like(context.tokens))


def span_starts(spans: tuple[Span, ...]) -> list[int]:
  """Returns the number of the first embedding of each span, and at the end how many there are."""
  return list(itertools.accumulate((span.media * span.slots for span in spans), initial=0))
