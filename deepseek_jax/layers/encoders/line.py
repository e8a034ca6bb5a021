"""Convolutional stems for what runs along one line: text, and the spectra of sound."""

import abc
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.layers.attention.bidirectional import Bidirectional
from deepseek_jax.layers.bias import Bias, add_bias
from deepseek_jax.layers.encoders.interface import (
  Learned,
  Tokens,
  first_real,
  join_line,
  not_divisible,
)
from deepseek_jax.layers.feed_forward import MLP, SwiGLU
from deepseek_jax.layers.norm import LayerNorm, RMSNorm
from deepseek_jax.layers.weights import table, weight
from deepseek_jax.ops.patch import convolve
from deepseek_jax.ops.stft import log_mel, stream_frames

KERNEL = 3
"""Places that a convolution of a stem looks at."""


class LineStem(nn.Module):
  """[R, T, C] -> [R, N, W]: two convolutions with a GELU after each; the second has the stride.

  Source: Radford et al., arXiv 2212.04356, section 2.2.
  """

  width: int
  stride: int
  bias: Bias | None

  @nn.compact
  def __call__(self, x: jax.Array, counts: jax.Array, position: Learned | None) -> Tokens:
    """Runs `x` [R, T, C], of which the first `counts` [R] places are real.

    What is beyond them is silence to the convolutions: a medium's tokens do not depend on how far
    it was padded.
    """
    real = first_real(counts, x.shape[1])
    for name, stride in (('first', 1), ('second', self.stride)):
      shape = (KERNEL, x.shape[-1], self.width)
      axes = (None, None, 'embed')
      kernel = weight(self, name, shape, axes, dtype=x.dtype, inputs=2)
      x = convolve(jnp.where(real[..., None], x, 0), kernel, stride)
      x = jax.nn.gelu(add_bias(self.bias, self, f'{name}_bias', x, (None,)), approximate=False)
      real = first_real(counts, x.shape[1], stride)
    if position is not None:
      x = position.add(self, x)
    places = jnp.broadcast_to(jnp.arange(x.shape[1])[None, :, None], (*x.shape[:2], 1))
    return Tokens(x, real, places)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line(abc.ABC):
  """What encoders along a line have in common.

  Attributes:
    width: channels of the encoder's stream.
    depth: layers.
    attention: attention of every layer; with `rope=Axial()` it knows the order.
    feed_forward: feed-forward of every layer.
    merge: neighbouring places that become one token of the decoder.
    norm: norm before each sublayer and at the end.
    position: what is added for a place, or None.
    bias: offsets of the convolutions, or None.
  """

  width: int
  depth: int
  attention: Bidirectional
  feed_forward: SwiGLU | MLP
  merge: int = 1
  norm: RMSNorm | LayerNorm = RMSNorm()
  position: Learned | None = Learned()
  bias: Bias | None = None

  @property
  @abc.abstractmethod
  def patches(self) -> int:
    """Places N of a medium: tokens of the encoder."""

  @property
  def slots(self) -> int:
    """Tokens of the decoder that a medium takes the place of."""
    return self.patches // self.merge

  def join(self, tokens: Tokens) -> Tokens:
    """Joins neighbours, [R, N, W] to [R, slots, merge · W]."""
    return join_line(tokens, self.merge)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text1D(Line):
  """An encoder of passages of text that are not the row's own: embedding, convolutions, layers.

  Attributes:
    vocab: entries V of the vocabulary.
    length: most tokens T of a passage.
    stride: tokens from one place of the encoder to the next.
    merge: neighbouring places that become one token of the decoder.
    width: channels of the encoder's stream.
    depth: layers.
    attention: attention of every layer; with `rope=Axial()` it knows the order.
    feed_forward: feed-forward of every layer.
    norm: norm before each sublayer and at the end.
    position: what is added for a place, or None.
    bias: offsets of the convolutions, or None.
  """

  vocab: int
  length: int = 64
  stride: int = 1

  def __post_init__(self):
    sizes = ('vocab', 'length', 'stride', 'merge', 'width', 'depth')
    errors = wrong_sizes(self, sizes)
    parts = [('stride', self.stride), ('merge', self.merge)]
    errors += not_divisible(self.length, 'length', parts)
    if errors:
      raise ConfigError(errors)

  @property
  def patches(self) -> int:
    """Places N of a passage: tokens of the encoder."""
    return self.length // self.stride

  @property
  def medium(self) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a passage."""
    return (self.length,), 'int32'

  @property
  def stem_vectors(self) -> dict[str, int]:
    """Vectors that meet a weight of the stem, where they are not `patches`: the first kernel."""
    return {'line/first': self.length}

  def stem(self, dtype: DTypeLike, name: str | None = None) -> nn.Module:
    """Returns the module that makes the encoder's tokens."""
    return TextStem(self, dtype, name=name)


class TextStem(nn.Module):
  """Passages [R, T] int32 -> tokens [R, N, W]."""

  config: Text1D
  dtype: DTypeLike

  @nn.compact
  def __call__(self, passages: jax.Array, counts: jax.Array) -> Tokens:
    """Embeds `passages` [R, T], of which `counts` [R] tokens are real."""
    c = self.config
    entries = table(self, 'embedding', (c.vocab, c.width), ('vocab', 'embed'), std=0.02)
    # As large as what the convolutions expect: entries are small, for the sake of the head's.
    x = jnp.take(entries, passages, axis=0).astype(self.dtype) / 0.02
    return LineStem(c.width, c.stride, c.bias, name='line')(x, counts, c.position)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Waveform(Line):
  """An encoder of sound: spectra of short frames in mel bands, convolutions, bidirectional layers.

  Each frame ends with the newest samples, so that a sound can be encoded while it comes in.

  Attributes:
    samples: most samples L of a sound, at `rate`; shorter ones are told by their count.
    rate: samples a second; bring others to it with `ops.stft.resample`.
    window: samples of a frame.
    hop: samples from one frame to the next.
    bands: mel bands.
    merge: neighbouring places that become one token of the decoder.
    width: channels of the encoder's stream.
    depth: layers.
    attention: attention of every layer; with `rope=Axial()` it knows the order.
    feed_forward: feed-forward of every layer.
    norm: norm before each sublayer and at the end.
    position: what is added for a place, or None.
    bias: offsets of the convolutions, or None.

  Source: Radford et al., arXiv 2212.04356, section 2.2.
  """

  samples: int = 16_000
  rate: int = 16_000
  window: int = 400
  hop: int = 160
  bands: int = 80

  def __post_init__(self):
    sizes = ('samples', 'rate', 'window', 'hop', 'bands', 'merge', 'width', 'depth')
    errors = wrong_sizes(self, sizes)
    if not errors:
      parts = [('hop', self.hop), ('merge', self.merge), ('stride', STRIDE)]
      errors = not_divisible(self.samples, 'samples', parts)
      if self.window < self.hop:
        errors.append(f'`window` is {self.window}, less than `hop` {self.hop}: sound would be lost')
      if self.bands > self.window // 2:
        errors.append(f'`bands` is {self.bands}; a spectrum of `window` {self.window} has fewer')
    if errors:
      raise ConfigError(errors)

  @property
  def patches(self) -> int:
    """Places N of a sound: tokens of the encoder."""
    return self.samples // self.hop // STRIDE

  @property
  def medium(self) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a sound."""
    return (self.samples,), 'float32'

  @property
  def stem_vectors(self) -> dict[str, int]:
    """Vectors that meet a weight of the stem, where they are not `patches`: the first kernel."""
    return {'line/first': self.samples // self.hop}

  def stem(self, dtype: DTypeLike, name: str | None = None) -> nn.Module:
    """Returns the module that makes the encoder's tokens."""
    return WaveformStem(self, dtype, name=name)


STRIDE = 2
"""Frames from one place of the encoder to the next."""


def sound_features(config: Waveform, framed: jax.Array) -> jax.Array:
  """Returns what the convolutions read of frames [..., F, window]: [..., F, bands] float32.

  About -1 for silence and 1 for a loud tone.
  """
  return log_mel(framed, config.rate, config.bands) / 5.0 + 1.0


class WaveformStem(nn.Module):
  """Sounds [R, L] float32 -> tokens [R, N, W]."""

  config: Waveform
  dtype: DTypeLike

  @nn.compact
  def __call__(self, sounds: jax.Array, counts: jax.Array) -> Tokens:
    """Embeds `sounds` [R, L], of which `counts` [R] samples are real."""
    c = self.config
    # Spectra are float32 in every precision: power spans ten orders of magnitude.
    x = jnp.where(first_real(counts, c.samples), sounds.astype(jnp.float32), 0.0)
    tail = jnp.zeros((x.shape[0], c.window - c.hop), jnp.float32)
    framed, _ = stream_frames(tail, x, c.window, c.hop)
    features = sound_features(c, framed).astype(self.dtype)
    line = LineStem(c.width, STRIDE, c.bias, name='line')
    return line(features, -(-counts // c.hop), c.position)
