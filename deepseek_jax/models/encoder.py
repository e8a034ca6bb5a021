"""Runs an encoder's layers between its stem and its projection."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.layers.context import Context, Media
from deepseek_jax.layers.encoders.interface import EncoderConfig
from deepseek_jax.layers.encoders.line import Text1D, Waveform
from deepseek_jax.layers.encoders.patch import Patch2D, Patch3D
from deepseek_jax.layers.encoders.points import Points
from deepseek_jax.layers.encoders.projection import SeparateProjection, SharedProjection
from deepseek_jax.models.plan import Block, Segment, segment
from deepseek_jax.models.remat import Remat
from deepseek_jax.models.stack import Stack
from deepseek_jax.sharding.rules import Rules

AnyEncoder = Patch2D | Patch3D | Text1D | Waveform | Points
"""The encoder kinds."""

AnyProjection = SharedProjection | SeparateProjection
"""How what encoders make comes to a model's width."""


def encoder_layers(config: EncoderConfig) -> list[Block]:
  """Returns the layers of an encoder, first to last."""
  block = Block(attention=config.attention, feed_forward=config.feed_forward, norm=config.norm)
  return [block] * config.depth


def encoder_segments(config: EncoderConfig) -> tuple[Segment, ...]:
  """Returns the scans that run an encoder's layers.

  Rematerialisation does not regroup them, as it may a decoder's: an encoder is short, and so its
  weights have one address.
  """
  return segment(encoder_layers(config))


def no_media(config: EncoderConfig, rows: int) -> Media:
  """Returns one empty medium a row, [rows, 1, …], as an encoder reads them."""
  shape, dtype = config.medium
  return Media(jnp.zeros((rows, 1, *shape), dtype), jnp.zeros((rows, 1), jnp.int32))


class Encoder(nn.Module):
  """Media [B, M, …] -> embeddings [B, M · slots, D], each medium by itself.

  Attributes:
    config: the encoder.
    width: channels D of the model.
    dtype: compute dtype.
    remat: what the backward pass recomputes, or None.
    ending: how its channels come to the model's; what all encoders share is the model's own.
  """

  config: AnyEncoder
  width: int
  dtype: DTypeLike = jnp.float32
  remat: Remat | None = None
  ending: AnyProjection = SeparateProjection()

  def setup(self):
    """Declares the parts."""
    c = self.config
    self.stem = c.stem(self.dtype)
    self.stack = Stack(encoder_segments(c), self.remat)
    self.norm = c.norm.build()
    self.projection = self.ending.own(self.width)

  def __call__(self, media: Media, rules: Rules) -> tuple[jax.Array, jax.Array]:
    """Encodes all media of all rows at once.

    Returns:
      [B, M · slots, D], those of a row's first medium first; and [B, M · slots] bool, which of them
      show anything.
    """
    batch = media.counts.shape[0]
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    tokens = self.stem(flat(media.values), flat(media.counts))
    x = rules.constrain(tokens.values, ('batch', 'seq', 'act_embed'))
    numbers = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    # Tokens of an encoder have no ids.
    context = Context(
      tokens=jnp.zeros_like(numbers),
      positions=numbers,
      segments=tokens.real.astype(jnp.int32),
      coordinates=tokens.coordinates,
      rules=rules,
    )
    x, _ = self.stack(x, context)
    joined = self.config.join(tokens.replace(values=self.norm(x)))
    x = rules.constrain(self.projection(joined.values), ('batch', 'seq', 'act_embed'))
    # The merged axes lie together: rows of a device stay on it.
    return x.reshape(batch, -1, x.shape[-1]), joined.real.reshape(batch, -1)
