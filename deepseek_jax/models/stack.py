"""Runs any plan of layers: one scan a segment."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from deepseek_jax.layers.context import Context
from deepseek_jax.layers.feed_forward import Remembering
from deepseek_jax.models.pipeline import Stages
from deepseek_jax.models.plan import Block, Segment
from deepseek_jax.models.remat import Remat
from deepseek_jax.models.stages import run_stages


class BlockCache(NamedTuple):
  """What a layer remembers of each row: arrays [B, …].

  Attributes:
    attention: the attention's cache.
    feed_forward: the feed-forward's; None where each token is alone to it.
  """

  attention: Any
  feed_forward: Any = None


class TransformerBlock(nn.Module):
  """One layer of the plan: stream -> stream; [B, T, D] under the plain residual."""

  config: Block

  @nn.compact
  def __call__(
    self, stream: Any, context: Context, cache: BlockCache | None = None
  ) -> tuple[Any, BlockCache | None]:
    """Runs attention and feed-forward; returns the stream and the cache."""
    c, old = self.config, BlockCache(None) if cache is None else cache
    layout = ('batch', 'seq', 'act_embed')
    stream = context.rules.constrain(stream, c.residual.stream_axes)
    site = c.residual.build('attention_residual')
    x, mix = site.read(stream)
    x = context.rules.constrain(x, layout)
    attention = c.attention.build('attention')
    y, seen = attention(c.norm.build('attention_norm')(x), context, old.attention)
    stream = site.write(stream, checkpoint_name(y, 'attention'), mix)
    site = c.residual.build('feed_forward_residual')
    x, mix = site.read(stream)
    x = context.rules.constrain(x, layout)
    feed_forward = c.feed_forward.build('feed_forward')
    x, memory = c.norm.build('feed_forward_norm')(x), None
    if old.feed_forward is None:
      y = feed_forward(x, context)
    else:
      y, memory = feed_forward(x, context, old.feed_forward)
    stream = site.write(stream, checkpoint_name(y, 'feed_forward'), mix)
    return stream, None if cache is None else BlockCache(seen, memory)


class Pattern(nn.Module):
  """The blocks of one scan step, one after another, on a stream such as [B, T, D]."""

  blocks: tuple[Block, ...]

  @nn.compact
  def __call__(self, stream: Any, context: Context, caches: Any = None) -> tuple[Any, Any]:
    """Runs every block; `caches` is a tuple with one cache a block, or None."""
    written = []
    for place, block in enumerate(self.blocks):
      cache = None if caches is None else caches[place]
      stream, cache = TransformerBlock(block, name=f'block_{place}')(stream, context, cache)
      written.append(cache)
    return stream, None if caches is None else tuple(written)


class Stack(nn.Module):
  """All segments of a plan, in order; weights of a scan have a leading `layers` axis.

  The carry may have any rank: [B, T, D], or [B, T, R, D] with several residual lanes.
  """

  segments: tuple[Segment, ...]
  remat: Remat | None = None
  stages: Stages | None = None

  @nn.compact
  def __call__(self, stream: Any, context: Context, caches: Any = None) -> tuple[Any, Any]:
    """Runs the plan; `caches` is what `empty_caches` returns, or None."""
    written = []
    staged = [] if caches is not None else self._staged(context)
    for number, part in enumerate(self.segments):
      if number in staged:
        # All rounds at once.
        if number == staged[0]:
          stream = self._run_staged(staged, stream, context)
        continue
      scanned = part.repeats > 1
      module: Any = Pattern
      if self.remat is not None:
        module = self.remat.wrap(module, scanned)
      if scanned:
        module = nn.scan(
          module,
          variable_axes={'params': 0, 'buffers': 0, 'losses': 0, 'observed': 0},
          split_rngs={'params': True, 'noise': True},
          in_axes=(nn.broadcast, 0),
          length=part.repeats,
          metadata_params={nn.PARTITION_NAME: part.axis},
        )
      cache = None if caches is None else caches[number]
      run = module(part.pattern, name=f'segment_{number}')
      stream, cache = run(stream, context, cache)
      written.append(cache)
    return stream, None if caches is None else tuple(written)

  def _staged(self, context: Context) -> list[int]:
    """Numbers of the segments that go through the stages, where the rules put layers there."""
    if self.stages is None or not context.rules.stage or self.is_initializing():
      return []
    return [number for number, part in enumerate(self.segments) if part.axis == 'stage']

  def _run_staged(self, numbers: list[int], stream: Any, context: Context) -> Any:
    """Runs the segments that are cut over stages."""
    assert self.stages is not None
    module = Pattern if self.remat is None else self.remat.wrap(Pattern, scanned=True)
    repeat = module(self.segments[numbers[0]].pattern, parent=None)
    return run_stages(self, repeat, numbers, self.stages, stream, context)


def empty_cache(
  block: Block, batch: int, length: int, dtype: DTypeLike, spare: int = 0
) -> BlockCache:
  """Returns the empty cache of one layer, [B, …]; arguments are those of `empty_caches`."""
  feed_forward, sizes = block.feed_forward, (batch, length, dtype, spare)
  memory = feed_forward.empty_cache(*sizes) if isinstance(feed_forward, Remembering) else None
  return BlockCache(block.attention.empty_cache(*sizes), memory)


def empty_caches(
  segments: Sequence[Segment], batch: int, length: int, dtype: DTypeLike, spare: int = 0
) -> Any:
  """Returns empty caches for a stack: [B, …] each, or [repeats, B, …] in a scanned segment.

  Args:
    segments: the plan.
    batch: rows B.
    length: most tokens of a row.
    dtype: compute dtype.
    spare: of the tokens fed last, how many can be taken back by feeding earlier positions again.

  Raises:
    ConfigError: `spare` is not 0, and a layer cannot take tokens back.
  """

  def repeat(cache, times):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (times, *x.shape)), cache)

  result = []
  for part in segments:
    caches = tuple(empty_cache(block, batch, length, dtype, spare) for block in part.pattern)
    result.append(repeat(caches, part.repeats) if part.repeats > 1 else caches)
  return tuple(result)
