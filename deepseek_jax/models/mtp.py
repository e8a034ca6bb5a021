"""Multi-token prediction: small modules that look further ahead.

In training they make the model plan; in generation they can draft tokens for it.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.shared_window import SharedWindow
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.weights import weight
from deepseek_jax.models.plan import Block
from deepseek_jax.models.stack import BlockCache, TransformerBlock


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTP:
  """Predicts tokens beyond the next one.

  Attributes:
    depth: modules; module k predicts the token k + 1 places ahead.

  Source: DeepSeek-V3, arXiv 2412.19437, section 2.2.
  """

  depth: int = 1

  def __post_init__(self):
    _check_depth(self.depth)

  def block(self, last: Block) -> Block:
    """Returns the layer of each module, from the model's last."""
    return last

  def build(self, last: Block) -> nn.Module:
    """Returns one module."""
    return MTPModule(self.block(last))

  def start(self, stream: jax.Array, hidden: jax.Array) -> jax.Array:
    """Returns what the first module reads: the normalised hidden state [B, T, D]."""
    del stream
    return hidden


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaneMTP:
  """Predicts tokens beyond the next one from every lane of the residual stream.

  Attributes:
    attention: of the modules' layer, whose other parts are those of the model's last.
    depth: modules; module k predicts the token k + 1 places ahead.

  Source: DeepSeek-V4, arXiv 2606.19348, and its released code.
  """

  attention: SharedWindow
  depth: int = 1

  def __post_init__(self):
    _check_depth(self.depth)

  def block(self, last: Block) -> Block:
    """Returns the layer of each module, from the model's last."""
    return dataclasses.replace(last, attention=self.attention)

  def build(self, last: Block) -> nn.Module:
    """Returns one module."""
    return LaneMTPModule(self.block(last))

  def start(self, stream: jax.Array, hidden: jax.Array) -> jax.Array:
    """Returns what the first module reads: the stream [B, T, R, D] after the last layer."""
    del hidden
    return stream


def _check_depth(depth: int) -> None:
  if depth < 1:
    raise ConfigError(f'`depth` is {depth}; expected 1 or more, or `mtp` None')


class MTPModule(nn.Module):
  """One depth: joins the previous depth's hidden state with the embedding of a later token.

  The released weights order the join as [embedding ; hidden], the other way round than the paper's
  equation 21, and the hidden state comes from after the final norm.
  """

  block: Block

  @nn.compact
  def __call__(
    self,
    hidden: jax.Array,
    embedded: jax.Array,
    context: Context,
    cache: BlockCache | None = None,
  ) -> tuple[jax.Array, jax.Array, BlockCache | None]:
    """Returns what the next depth reads and the normalised hidden state of this one: the same.

    The cache is the third result.

    Args:
      hidden: [B, T, D] of the previous depth, after its norm.
      embedded: [B, T, D] embedding of the token this depth may see.
      context: facts about the T tokens.
      cache: what the module's layer remembers of the row's earlier tokens, or None.
    """
    width = hidden.shape[-1]
    norm, residual = self.block.norm, self.block.residual
    joined = jnp.concatenate(
      [norm.build('embedding_norm')(embedded), norm.build('hidden_norm')(hidden)], axis=-1
    )
    w = weight(self, 'join', (2 * width, width), ('embed', None), dtype=hidden.dtype)
    stream = residual.build('open').open(jnp.einsum('bte,ed->btd', joined, w))
    stream, cache = TransformerBlock(self.block, name='block')(stream, context, cache)
    hidden = norm.build('norm')(residual.build('close').close(stream))
    return hidden, hidden, cache


class LaneMTPModule(nn.Module):
  """One depth: adds the embedding of a later token to every lane of the previous depth's stream.

  Each has a matrix and a norm of its own; so have the lanes' last mix and the norm after it.
  """

  block: Block

  @nn.compact
  def __call__(
    self,
    stream: jax.Array,
    embedded: jax.Array,
    context: Context,
    cache: BlockCache | None = None,
  ) -> tuple[jax.Array, jax.Array, BlockCache | None]:
    """Returns the stream of this depth, which the next one reads, and its normalised hidden state.

    The cache is the third result.

    Args:
      stream: [B, T, R, D] of the previous depth, or [B, T, D] under the plain residual.
      embedded: [B, T, D] embedding of the token this depth may see.
      context: facts about the T tokens.
      cache: what the module's layer remembers of the row's earlier tokens, or None.
    """
    width = embedded.shape[-1]
    norm, residual = self.block.norm, self.block.residual

    def joined(name: str, x: jax.Array) -> jax.Array:
      w = weight(self, f'{name}_join', (width, width), ('embed', None), dtype=embedded.dtype)
      normed = norm.build(f'{name}_norm')(x)
      return jnp.einsum('...d,de->...e', normed.astype(embedded.dtype), w)

    later = residual.build('open').open(joined('embedding', embedded))
    stream = later + joined('hidden', stream).astype(later.dtype)
    stream, cache = TransformerBlock(self.block, name='block')(stream, context, cache)
    return stream, norm.build('norm')(residual.build('close').close(stream)), cache
