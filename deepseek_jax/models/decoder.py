"""The language model that every family builds: embedding, stack, norm, head, MTP modules."""

from collections.abc import Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.layers.context import Context, text_context
from deepseek_jax.layers.embedding import Embedding
from deepseek_jax.layers.weights import weight
from deepseek_jax.models.mtp import MTP, LaneMTP
from deepseek_jax.models.pipeline import Stages
from deepseek_jax.models.plan import Block, Segment, segment, stack, unstack
from deepseek_jax.models.remat import Remat
from deepseek_jax.models.stack import Stack


class Family(Protocol):
  """What a model family's config offers."""

  @property
  def width(self) -> int:
    """Channels D of the residual stream."""

  @property
  def vocab(self) -> int:
    """Entries V of the vocabulary."""

  @property
  def mtp(self) -> MTP | LaneMTP | None:
    """Multi-token prediction, or None."""

  def layers(self) -> list[Block]:
    """Returns the layers, first to last."""


class Head(nn.Module):
  """The output matrix [D, V]."""

  width: int
  vocab: int

  @nn.compact
  def __call__(self, dtype: DTypeLike) -> jax.Array:
    """Returns the matrix [D, V] in `dtype`."""
    return weight(self, 'weight', (self.width, self.vocab), ('embed', 'vocab'), dtype=dtype)


class Decoder(nn.Module):
  """Tokens [B, T] -> hidden states [B, T, D] after the final norm.

  Attributes:
    config: the family.
    dtype: compute dtype; the embedding's output is cast to it once and it flows from there.
    remat: what the backward pass recomputes, or None.
    stages: what cuts the layers over pipeline stages, or None.
  """

  config: Family
  dtype: DTypeLike = jnp.float32
  remat: Remat | None = None
  stages: Stages | None = None

  def setup(self):
    """Declares the parts."""
    c, layers = self.config, self.config.layers()
    self.embedding = Embedding(vocab=c.vocab, width=c.width).build()
    self.open = layers[0].residual.build()
    self.stack = Stack(self.segments, self.remat, self.stages)
    self.close = layers[-1].residual.build()
    self.norm = layers[-1].norm.build()
    self.head = Head(c.width, c.vocab)
    self.mtp = [] if c.mtp is None else [c.mtp.build(layers[-1]) for _ in range(c.mtp.depth)]

  @property
  def segments(self) -> tuple[Segment, ...]:
    """The scans that run the layers."""
    return plan_segments(self.config, self.remat, self.stages)

  def embed(self, tokens: jax.Array, context: Context) -> jax.Array:
    """Returns embeddings [B, T, D] in the compute dtype."""
    x = context.between_layouts(self.embedding(tokens).astype(self.dtype))
    return context.rules.constrain(x, ('batch', 'seq', 'act_embed'))

  def __call__(self, context: Context, caches: Any = None) -> tuple[jax.Array, Any]:
    """Returns hidden states [B, T, D] after the final norm, and the caches."""
    stream, caches = self.run(context, caches)
    return self.finish(stream), caches

  @nn.nowrap
  def inner(self, context: Context) -> Context:
    """Returns the context [B, T] as the layers of the stack are given it."""
    return context

  def run(self, context: Context, caches: Any = None) -> tuple[jax.Array, Any]:
    """Returns the residual stream [B, T, …] after the last layer, and the caches."""
    stream = self.open.open(self.embed(context.tokens, context))
    return self.stack(stream, self.inner(context), caches)

  def finish(self, stream: jax.Array) -> jax.Array:
    """Returns the hidden states [B, T, D] of a stream [B, T, …], after the final norm."""
    return self.norm(self.close.close(stream))

  def every_depth(self, context: Context) -> list[jax.Array]:
    """Returns hidden states [B, T, D]: those that predict the next token, and of every MTP depth.

    Depth k at position t sees token t + k; where the row has no such token the result is
    meaningless and its target has no weight.
    """
    stream, _ = self.run(context)
    result = [self.finish(stream)]
    if self.config.mtp is None:
      return result
    state = self.config.mtp.start(stream, result[0])
    for depth in range(1, len(self.mtp) + 1):
      tokens = context.tokens_ahead(depth)
      state, hidden, _ = self.ahead(depth, state, tokens, context)
      result.append(hidden)
    return result

  def ahead(
    self, depth: int, state: jax.Array, tokens: jax.Array, context: Context, cache: Any = None
  ) -> tuple[jax.Array, jax.Array, Any]:
    """Runs one MTP depth.

    Args:
      depth: which, from 1.
      state: [B, T, …] of the depth before; the first reads what `config.mtp.start` makes.
      tokens: [B, T] int32 the token `depth` places after each position.
      context: facts about the positions themselves.
      cache: what the depth remembers of the row's earlier positions, or None.

    Returns:
      What the next depth reads, the hidden states [B, T, D] of this one, and the cache.
    """
    return self.mtp[depth - 1](state, self.embed(tokens, context), context, cache)

  def head_matrix(self) -> jax.Array:
    """Returns the output matrix [D, V] in the compute dtype."""
    return self.head(self.dtype)

  def logits(self, hidden: jax.Array, context: Context) -> jax.Array:
    """Returns float32 logits [B, T, V] of hidden states [B, T, D]."""
    matrix = self.head_matrix()
    logits = jnp.einsum('btd,dv->btv', hidden, matrix, preferred_element_type=jnp.float32)
    return context.rules.constrain(logits, ('batch', 'seq', 'act_vocab'))

  def everything(self, context: Context) -> jax.Array:
    """Runs every part once on tokens [B, T], so that `init` declares every weight."""
    return self.logits(self.every_depth(context)[0], context)


def plan_segments(
  family: Family, remat: Remat | None = None, stages: Stages | None = None
) -> tuple[Segment, ...]:
  """Returns the scans that run a family's layers.

  Raises:
    ConfigError: the layers cannot be cut over the stages.
  """
  segments = segment(family.layers())
  if remat is not None:
    segments = remat.regroup(segments)
  return segments if stages is None else stages.cut(segments)


def init_variables(decoder: Decoder, key: jax.Array) -> dict[str, Any]:
  """Returns fresh `params` and `buffers`, every leaf boxed with its logical axis names.

  Arrays do not depend on batch or length; run it under `jax.eval_shape` for shapes alone.
  """
  context = text_context(jnp.zeros((1, 2), jnp.int32))
  variables = decoder.init(key, context, method='everything')
  return {'params': variables['params'], 'buffers': variables.get('buffers', {})}


def canonical(tree: dict[str, Any], segments: Sequence[Segment]) -> dict[str, Any]:
  """Renames a collection's `stack` to `layers/<i>`, one entry a layer, whatever the grouping."""
  rest = {key: value for key, value in tree.items() if key != 'stack'}
  return {**rest, 'layers': unstack(tree.get('stack', {}), segments)}


def layer_of(address: str) -> str:
  """Returns the layer that a canonical address of a feed-forward lies in, such as 'layers/3'."""
  return address.removesuffix('/feed_forward').removesuffix('/block')


def grouped(tree: dict[str, Any], segments: Sequence[Segment]) -> dict[str, Any]:
  """The inverse of `canonical`."""
  rest = {key: value for key, value in tree.items() if key != 'layers'}
  stacked = stack(tree.get('layers', {}), segments)
  return {**rest, 'stack': stacked} if stacked else rest
