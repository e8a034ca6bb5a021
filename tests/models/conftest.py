"""A V3 small enough to compile in a moment, with weights away from their start."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.layers.attention.bidirectional import Bidirectional
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.rope import Axial
from deepseek_jax.layers.context import Context, Media
from deepseek_jax.layers.encoders.line import Text1D, Waveform
from deepseek_jax.layers.encoders.patch import Patch2D, Patch3D
from deepseek_jax.layers.encoders.points import Points
from deepseek_jax.layers.encoders.projection import SharedProjection
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.balance import SequenceBalance
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.decoder import canonical, init_variables, plan_segments
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.multimodal import Multimodal
from deepseek_jax.models.seeing import media_spans, span_starts


@pytest.fixture(scope='session')
def tiny() -> Callable[..., DeepSeekV3]:
  """Makes a tiny V3 of one dense and `depth` - 1 sparse layers."""

  def make(depth: int = 3, **changes: Any) -> DeepSeekV3:
    model = DeepSeekV3(
      depth=depth,
      width=8,
      vocab=13,
      attention=MLA(heads=2, nope_dim=4, rope_dim=2, value_dim=3, latent=5),
      dense=SwiGLU(hidden=6),
      feed_forward=MoE(experts=4, top_k=2, hidden=3, balance=SequenceBalance(weight=0.1)),
    )
    return dataclasses.replace(model, **changes)

  return make


@pytest.fixture(scope='session')
def context() -> Context:
  """Two packed rows of 9 tokens: two documents and padding; one document."""
  tokens = np.random.default_rng(0).integers(3, 13, (2, 9)).astype(np.int32)
  tokens[0, 7:] = 0
  positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8]], np.int32)
  segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 9], np.int32)
  return Context(
    tokens=jnp.asarray(tokens), positions=jnp.asarray(positions), segments=jnp.asarray(segments)
  )


@pytest.fixture(scope='session')
def canonical_variables() -> Callable[[DeepSeekV3], dict[str, Any]]:
  """Makes `params` and `buffers` with layers at their canonical addresses, all of them random."""

  def make(model: DeepSeekV3) -> dict[str, Any]:
    decoder = model.build()
    shapes = nn.meta.unbox(jax.eval_shape(lambda k: init_variables(decoder, k), jax.random.key(0)))
    rng = np.random.default_rng(1)

    def fill(leaf):
      draw = rng.standard_normal(leaf.shape).astype(np.float32)
      return 1 + 0.2 * draw if leaf.shape[-1:] == leaf.shape else draw / np.sqrt(leaf.shape[-2])

    params = jax.tree.map(fill, shapes['params'])
    buffers = jax.tree.map(lambda leaf: 0.1 * np.cos(np.arange(leaf.size)), shapes['buffers'])
    buffers = jax.tree.map(
      lambda x, leaf: x.reshape(leaf.shape).astype(np.float32), buffers, shapes['buffers']
    )
    segments = plan_segments(model)
    return {
      'params': canonical(params, segments),
      'buffers': canonical(buffers, segments),
    }

  return make


ENCODER = {
  'width': 8,
  'depth': 1,
  'attention': Bidirectional(heads=2, head_dim=6, rope=Axial()),
  'feed_forward': SwiGLU(hidden=12),
}


@pytest.fixture(scope='session')
def sighted(tiny) -> Callable[..., Any]:
  """Makes a tiny model of all kinds of media, or of another kind with more fields."""

  def make(kind: Any = Multimodal, **changes: Any) -> Any:
    parts = {
      'text': tiny(depth=2),
      'image': Patch2D(**ENCODER, size=8, patch=2),
      'video': Patch3D(**ENCODER, frames=4, size=8, patch=4, merge=1),
      'sound': Waveform(**ENCODER, samples=80, rate=1000, window=20, hop=10, bands=6, merge=2),
      'points': Points(**ENCODER, points=9, groups=3, neighbours=4, hidden=5),
      'passage': Text1D(**ENCODER, vocab=13, length=6, stride=2),
      'projection': SharedProjection(shared_dim=10),
    }
    return kind(**(parts | changes))

  return make


@pytest.fixture(scope='session')
def shown() -> Callable[..., Context]:
  """Makes two packed rows with two media of each kind: whole, cut short, and none."""

  def make(model: Any, seed: int = 0, slots: int | None = None) -> Context:
    rng = np.random.default_rng(seed)
    media = {}
    for kind, encoder in model.encoders.items():
      shape, dtype = encoder.medium
      values = rng.integers(0, 13 if dtype == 'int32' else 256, (2, 2, *shape))
      if dtype == 'float32':
        values = rng.uniform(-1, 1, values.shape)
      size = shape[0]
      counts = np.array([[size, -(-size // 2)], [size, 0]], np.int32)
      boxes = [[0, 0, 0, 1, 0.5], [0, 0, 0.5, 1, 1]]
      media[kind] = Media(
        jnp.asarray(values.astype(dtype)),
        jnp.asarray(counts),
        jnp.asarray([boxes] * 2, jnp.float32) if kind == 'tile' else None,
      )
    # A word, a medium, a word …; each row is two documents.
    starts = span_starts(media_spans(model, media))
    line, half = [], 0
    for number, span in enumerate(media_spans(model, media)):
      for medium in range(span.media):
        begin = starts[number] + medium * span.slots
        line += [-1, *range(begin, begin + (slots or span.slots))]
      half = len(line) if number == 1 else half
    places = np.array([[*line, -1, -1]] * 2, np.int32)
    length = places.shape[1]
    at = np.arange(length)
    later = at >= (half or length)
    positions = np.where(later, at - half, at)
    return Context(
      tokens=jnp.asarray(rng.integers(3, 13, (2, length)), jnp.int32),
      positions=jnp.asarray(np.stack([positions] * 2), jnp.int32),
      segments=jnp.asarray(np.stack([1 + later] * 2), jnp.int32),
      media=media,
      placeholders=jnp.asarray(places),
    )

  return make
