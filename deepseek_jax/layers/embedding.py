"""Token embedding and the output head."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.layers.weights import table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedding:
  """A vector for each token of the vocabulary.

  Attributes:
    vocab: entries V.
    width: channels D.
  """

  vocab: int
  width: int

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return TokenEmbedding(self, name=name)


class TokenEmbedding(nn.Module):
  """[B, T] int32 -> [B, T, D] float32."""

  config: Embedding

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Looks up `tokens` [B, T]."""
    shape = (self.config.vocab, self.config.width)
    weight = table(self, 'weight', shape, ('vocab', 'embed'), std=0.02)
    mesh = jax.sharding.get_abstract_mesh()
    spread = [axis for axis in mesh.auto_axes if mesh.shape[axis] > 1]
    if mesh.manual_axes and len(spread) > 1:
      # XLA's partitioner stops here at the lookup in a table that is not whole (jaxlib 0.12: "Check
      # failed" in `ExpandDeviceGroupsWithIota`).
      weight = jax.lax.with_sharding_constraint(weight, PartitionSpec(None, None))
    return jnp.take(weight, tokens, axis=0)
