"""The lightning indexer: small queries and keys whose products say which tokens matter."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.layers.attention.latent import Latent
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.weights import add_loss, scale, vector, weight
from deepseek_jax.ops.linear import linear
from deepseek_jax.ops.norm import layer_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Indexer:
  """Sizes of a lightning indexer.

  Attributes:
    heads: index heads J.
    dim: channels d of an index query or key; the first `rope_dim` of the attention are rotated.

  Source: DeepSeek-V3.2-Exp, section 2.1.
  """

  heads: int = 64
  dim: int = 128

  def __post_init__(self):
    errors = wrong_sizes(self, ('heads', 'dim'))
    if errors:
      raise ConfigError(errors)

  def check(self, rope_dim: int) -> list[str]:
    """Returns what is wrong with it in an attention that rotates `rope_dim` channels."""
    if rope_dim > self.dim:
      return [f'`dim` is {self.dim}, fewer than the {rope_dim} channels that are rotated']
    return []


class Index(NamedTuple):
  """What the indexer makes of T tokens.

  Attributes:
    query: [B, T, J, d].
    key: [B, T, d].
    weights: [B, T, J] float32.
  """

  query: jax.Array
  key: jax.Array
  weights: jax.Array


def add_indexer_loss(module: nn.Module, gap: jax.Array, context: Context, factor: float) -> None:
  """Reports the loss `indexer`: the mean over a row's tokens of the KL `gap` [B, T]."""
  real = jnp.asarray(context.real, jnp.float32)
  mean = jnp.sum(gap * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1.0)
  add_loss(module, 'indexer', factor * jnp.sum(mean))


class LightningIndexer(nn.Module):
  """Activations [B, T, D] and query latents [B, T, C] -> `Index`; passes no gradient to either."""

  indexer: Indexer
  attention: Latent

  @nn.compact
  def __call__(self, x: jax.Array, source: jax.Array, context: Context) -> Index:
    """Makes queries of `source` [B, T, C], keys and weights of `x` [B, T, D]."""
    c, width = self.indexer, x.shape[-1]
    x, source = jax.lax.stop_gradient((x, source))
    axis = 'embed' if self.attention.query_latent is None else 'latent'
    # Its heads are few, and every one is needed for a score: they are not spread over devices.
    shape = (source.shape[-1], c.heads * c.dim)
    up = weight(self, 'query', shape, (axis, None), dtype=x.dtype)
    down = weight(self, 'key', (width, c.dim), ('embed', None), dtype=x.dtype)
    query = linear(source, up)
    query = query.reshape(*query.shape[:2], c.heads, c.dim)
    key = linear(x, down)
    # A norm with an offset, unlike all others of the model.
    bias = vector(self, 'key_bias', np.zeros(c.dim))
    key = layer_norm(key, scale(self, 'key_scale', c.dim), bias)
    query, key = (self.rotate(y, context) for y in (query, key))
    # float32: the scores are ranked, and rounding makes ties.
    share = weight(self, 'weights', (width, c.heads), ('embed', None), dtype=jnp.float32)
    weights = jnp.einsum('btd,dj->btj', x.astype(jnp.float32), share)
    return Index(query, key, weights * (c.heads * c.dim) ** -0.5)

  def rotate(self, x: jax.Array, context: Context) -> jax.Array:
    """Turns the first channels of [B, T, …, d] to their positions, in halves; rounds all."""
    size = self.attention.rope_dim
    turned = self.attention.rope.rotate_halves(x[..., :size], context.positions)
    x = jnp.concatenate([turned, x[..., size:]], axis=-1)
    stored = self.attention.stored
    return x if stored is None else stored.round_index(x)
