"""Runs an encoder's layers between its stem and its projection."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.layers.context import text_context
from deepseek_jax.layers.encoders.patch import Patch2D
from deepseek_jax.models.plan import Block, Segment, segment
from deepseek_jax.models.remat import Remat
from deepseek_jax.models.stack import Stack
from deepseek_jax.sharding.rules import Rules


def encoder_layers(config: Patch2D) -> list[Block]:
  """Returns the layers of an encoder, first to last."""
  block = Block(attention=config.attention, feed_forward=config.feed_forward, norm=config.norm)
  return [block] * config.depth


def encoder_segments(config: Patch2D) -> tuple[Segment, ...]:
  """Returns the scans that run an encoder's layers.

  Rematerialisation does not regroup them, as it may a decoder's: an encoder is short, and so its
  weights have one address.
  """
  return segment(encoder_layers(config))


class Encoder(nn.Module):
  """Media [R, …] -> embeddings [R, S, D] for a decoder of width D.

  Attributes:
    config: the encoder.
    width: channels D of the decoder.
    dtype: compute dtype.
    remat: what the backward pass recomputes, or None.
  """

  config: Patch2D
  width: int
  dtype: DTypeLike = jnp.float32
  remat: Remat | None = None

  def setup(self):
    """Declares the parts."""
    c = self.config
    self.stem = c.stem(self.dtype)
    self.stack = Stack(encoder_segments(c), self.remat)
    self.norm = c.norm.build()
    self.projection = c.projection(self.width)

  def __call__(self, media: jax.Array, rules: Rules) -> jax.Array:
    """Encodes `media` [R, …], every one by itself."""
    x = rules.constrain(self.stem(media), ('batch', 'seq', 'act_embed'))
    # The tokens of an encoder have no ids; its layers ask for segments and positions alone.
    context = text_context(jnp.zeros(x.shape[:2], jnp.int32), rules)
    x, _ = self.stack(x, context)
    x = self.projection(self.norm(x))
    return rules.constrain(x, ('batch', 'seq', 'act_embed'))
