"""From a list of layers to a few scans, and from scans back to single layers."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.bidirectional import Bidirectional
from deepseek_jax.layers.attention.cross import CrossAttention, OrderedCross
from deepseek_jax.layers.attention.csa import CSA
from deepseek_jax.layers.attention.fusion import Fusion
from deepseek_jax.layers.attention.gated import Gated
from deepseek_jax.layers.attention.hca import HCA
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.mha import MHA
from deepseek_jax.layers.attention.nsa import NSA
from deepseek_jax.layers.attention.recurrent import Recurrent
from deepseek_jax.layers.attention.shared_window import SharedWindow
from deepseek_jax.layers.attention.sparse import DSA
from deepseek_jax.layers.attention.top_k import ModalityTopK, TopK
from deepseek_jax.layers.attention.window import Window
from deepseek_jax.layers.feed_forward import MLP, SwiGLU
from deepseek_jax.layers.hyper_connections import HyperConnections
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.norm import LayerNorm, RMSNorm
from deepseek_jax.layers.residual import Add


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
  """One layer: attention, then a feed-forward, each read from and written to the residual stream.

  Attributes:
    attention: how tokens see each other.
    feed_forward: what is done to each token alone.
    residual: how sublayers join the stream.
    norm: norm before each sublayer.
  """

  attention: (
    MLA
    | MHA
    | Window
    | Gated
    | TopK
    | ModalityTopK
    | DSA
    | NSA
    | Recurrent
    | SharedWindow
    | HCA
    | CSA
    | Bidirectional
    | CrossAttention
    | OrderedCross
    | Fusion
  )
  feed_forward: SwiGLU | MLP | MoE
  residual: Add | HyperConnections = Add()
  norm: RMSNorm | LayerNorm = RMSNorm()


@dataclasses.dataclass(frozen=True)
class Segment:
  """A pattern of neighbouring layers that is run `repeats` times by one scan.

  Attributes:
    pattern: the layers of one repeat.
    repeats: how often.
    axis: logical name of the axis that the repeats' variables are stacked along: `stage` where they
      are cut over pipeline stages.
  """

  pattern: tuple[Block, ...]
  repeats: int
  axis: Literal['layers', 'stage'] = 'layers'

  @property
  def layers(self) -> int:
    """Number of layers in the segment."""
    return len(self.pattern) * self.repeats


def segment(layers: Sequence[Block], longest: int = 8) -> tuple[Segment, ...]:
  """Groups equal neighbouring patterns, so that as few blocks as possible are compiled.

  The best grouping is found exactly, by dynamic programming from the last layer to the first:
  fewest blocks, then fewest segments.

  Args:
    layers: the layers, first to last.
    longest: longest pattern to look for.

  Returns:
    Segments whose layers, in order, are `layers`.

  Raises:
    ConfigError: there is no layer.
  """
  if not layers:
    raise ConfigError('a model needs at least 1 layer')
  total = len(layers)
  # Blocks are compared once each: below, numbers are.
  known = list(dict.fromkeys(layers))
  kinds = [known.index(layer) for layer in layers]
  best: list[tuple[int, int, tuple[Segment, ...]]] = [(0, 0, ())]
  best *= total + 1
  for start in reversed(range(total)):
    options = []
    for size in range(1, min(longest, total - start) + 1):
      pattern = kinds[start : start + size]
      end, repeats = start + size, 1
      # Fewer repeats than there are may be better: A, A, B, A, B is A and twice (A, B).
      while True:
        if size == 1 or repeats > 1:
          blocks, count, rest = best[end]
          part = Segment(tuple(layers[start : start + size]), repeats)
          options.append((blocks + size, count + 1, (part, *rest)))
        if kinds[end : end + size] != pattern:
          break
        end, repeats = end + size, repeats + 1
    best[start] = min(options, key=lambda option: option[:2])
  return best[0][2]


def unroll(segments: Sequence[Segment], repeats: int) -> tuple[Segment, ...]:
  """Makes every scan step run up to `repeats` repeats of its pattern, and a rest of its own."""
  result = []
  for part in segments:
    size = min(repeats, part.repeats)
    whole, rest = divmod(part.repeats, size)
    result.append(Segment(part.pattern * size, whole))
    if rest:
      result.append(Segment(part.pattern, rest))
  return tuple(result)


def unstack(tree: dict[str, Any], segments: Sequence[Segment]) -> dict[str, Any]:
  """Turns the variables of a stack into one entry a layer: `{'0': …, '1': …}`.

  This is the canonical address of a layer's weights, whatever way the plan was grouped. Leaves may
  be arrays or abstract shapes. Layers without variables (in collections such as `buffers`) are
  left out.

  Args:
    tree: variables of one collection of a `Stack`: `{'segment_0': {'block_0': …}}`.
    segments: the plan that the stack ran.
  """
  layers: dict[str, Any] = {}
  start = 0
  for number, part in enumerate(segments):
    group = tree.get(f'segment_{number}', {})
    for place in range(len(part.pattern)):
      block = group.get(f'block_{place}')
      if block is None:
        continue
      for repeat in range(part.repeats):
        index = start + repeat * len(part.pattern) + place
        pick = functools.partial(_pick, index=repeat)
        layers[str(index)] = block if part.repeats == 1 else _map(pick, block)
    start += part.layers
  return {key: layers[key] for key in sorted(layers, key=int)}


def stack(layers: dict[str, Any], segments: Sequence[Segment]) -> dict[str, Any]:
  """The inverse of `unstack`: groups the layers' variables for the scans of `segments`."""
  tree: dict[str, Any] = {}
  start = 0
  for number, part in enumerate(segments):
    group = {}
    for place in range(len(part.pattern)):
      indices = range(start + place, start + part.layers, len(part.pattern))
      blocks = [layers[str(i)] for i in indices if str(i) in layers]
      if not blocks:
        continue
      if len(blocks) != part.repeats:
        raise ConfigError(
          f'layers {list(indices)} share a scan, but only {len(blocks)} have variables'
        )
      group[f'block_{place}'] = blocks[0] if part.repeats == 1 else _zip(_join, blocks)
    if group:
      tree[f'segment_{number}'] = group
    start += part.layers
  return tree


def locate(address: str, segments: Sequence[Segment]) -> tuple[str, int | None]:
  """Returns where an array of a canonical address lies in variables that are grouped for scans.

  Args:
    address: such as 'params/layers/3/attention/output'.
    segments: the scans.

  Returns:
    The address there, and the place of the layer along the first axis of that array: None where
    the array is its own.

  Raises:
    ConfigError: there is no such layer.
  """
  collection, part, *rest = address.split('/')
  if part != 'layers':
    return address, None
  layer = int(rest[0])
  start = 0
  for number, scan in enumerate(segments):
    if layer < start + scan.layers:
      repeat, place = divmod(layer - start, len(scan.pattern))
      home = [collection, 'stack', f'segment_{number}', f'block_{place}', *rest[1:]]
      return '/'.join(home), None if scan.repeats == 1 else repeat
    start += scan.layers
  raise ConfigError(f'{address}: there are {start} layers')


def _map(function, tree):
  if isinstance(tree, dict):
    return {key: _map(function, value) for key, value in tree.items()}
  return function(tree)


def _zip(function, trees):
  if isinstance(trees[0], dict):
    return {key: _zip(function, [tree[key] for tree in trees]) for key in trees[0]}
  return function(trees)


def _pick(x, index: int):
  if isinstance(x, np.ndarray):
    # An entry of a vector stays an array.
    return np.asarray(x[index])
  if hasattr(x, 'at'):
    return x[index]
  return type(x)(x.shape[1:], x.dtype)


def _join(leaves):
  if isinstance(leaves[0], np.ndarray):
    return np.stack(leaves)
  if hasattr(leaves[0], 'at'):
    return jnp.stack(leaves)
  return type(leaves[0])((len(leaves), *leaves[0].shape), leaves[0].dtype)
