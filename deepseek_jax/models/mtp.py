"""Multi-token prediction: small modules that look further ahead in training."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.weights import weight
from deepseek_jax.models.plan import Block
from deepseek_jax.models.stack import TransformerBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTP:
  """Predicts tokens beyond the next one.

  Attributes:
    depth: modules; module k predicts the token k + 1 places ahead.

  Source: DeepSeek-V3, arXiv 2412.19437, section 2.2.
  """

  depth: int = 1

  def __post_init__(self):
    if self.depth < 1:
      raise ConfigError(f'`depth` is {self.depth}; expected 1 or more, or `mtp` None')


class MTPModule(nn.Module):
  """One depth: joins the previous depth's hidden state with the embedding of a later token.

  The released weights order the join as [embedding ; hidden], the other way round than the paper's
  equation 21, and the hidden state comes from after the final norm.
  """

  block: Block

  @nn.compact
  def __call__(self, hidden: jax.Array, embedded: jax.Array, context: Context) -> jax.Array:
    """Returns the normalised hidden state of this depth.

    Args:
      hidden: [B, T, D] of the previous depth, after its norm.
      embedded: [B, T, D] embedding of the token this depth may see.
      context: facts about the T tokens.
    """
    width = hidden.shape[-1]
    norm, residual = self.block.norm, self.block.residual
    joined = jnp.concatenate(
      [norm.build('embedding_norm')(embedded), norm.build('hidden_norm')(hidden)], axis=-1
    )
    w = weight(self, 'join', (2 * width, width), ('embed', None), dtype=hidden.dtype)
    stream = residual.build('open').open(jnp.einsum('bte,ed->btd', joined, w))
    stream, _ = TransformerBlock(self.block, name='block')(stream, context)
    return norm.build('norm')(residual.build('close').close(stream))
