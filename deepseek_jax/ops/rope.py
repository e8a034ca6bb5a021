"""Rotary position embedding: interleaved pairs, with YaRN context extension."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def rope_frequencies(dim: int, theta: float) -> np.ndarray:
  """Returns the angle per position of each pair of channels, [dim / 2] float32 radians.

  Source: Su et al., arXiv 2104.09864, equation 15.
  """
  exponent = np.arange(0, dim, 2, dtype=np.float64) / dim
  return (theta**-exponent).astype(np.float32)


def yarn_frequencies(
  frequencies: np.ndarray,
  *,
  theta: float,
  factor: float,
  original_length: int,
  beta_fast: float,
  beta_slow: float,
) -> np.ndarray:
  """Slows the low frequencies by `factor` and keeps the high ones, [dim / 2] float32.

  A channel that turns more than `beta_fast` times within `original_length` positions is kept, one
  that turns fewer than `beta_slow` times is interpolated, and a linear ramp joins the two.

  Args:
    frequencies: [dim / 2] from `rope_frequencies`.
    theta: base of those frequencies.
    factor: how many times longer the context becomes.
    original_length: tokens of context before extension.
    beta_fast: turns above which a channel is kept.
    beta_slow: turns below which a channel is interpolated in full.

  Source: Peng et al., arXiv 2309.00071, section 3.2.
  """
  dim = 2 * len(frequencies)

  def channel(turns: float) -> float:
    return dim * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

  low = max(math.floor(channel(beta_fast)), 0)
  high = min(math.ceil(channel(beta_slow)), dim - 1)
  width = high - low if high != low else 0.001
  ramp = np.clip((np.arange(dim // 2) - low) / width, 0.0, 1.0)
  return (frequencies / factor * ramp + frequencies * (1.0 - ramp)).astype(np.float32)


def yarn_magnitude(factor: float, mscale: float) -> float:
  """Returns 0.1 · mscale · ln(factor) + 1, the growth of logits that YaRN compensates.

  Source: Peng et al., arXiv 2309.00071, equation 22.
  """
  return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def rotate(
  x: jax.Array, positions: jax.Array, frequencies: np.ndarray, magnitude: float = 1.0
) -> jax.Array:
  """Turns each pair of neighbouring channels (2k, 2k + 1) by position × frequency k.

  Args:
    x: [B, T, ..., R] queries or keys.
    positions: [B, T] int32.
    frequencies: [R / 2] radians per position.
    magnitude: factor on the result (YaRN's, 1 in every released DeepSeek model).

  Returns:
    [B, T, ..., R] in the dtype of `x`; angles and products are float32, since a bfloat16 angle at
    position 1000 is wrong by radians.

  Source: Su et al., arXiv 2104.09864, equation 34 (interleaved layout).
  """
  return turn(x, positions.astype(jnp.float32)[..., None] * frequencies, magnitude)


def turn(x: jax.Array, angles: jax.Array, magnitude: float = 1.0) -> jax.Array:
  """Turns each pair of neighbouring channels (2k, 2k + 1) by an angle of its own.

  Args:
    x: [B, T, ..., R] queries or keys.
    angles: [B, T, R / 2] float32 radians.
    magnitude: factor on the result.

  Returns:
    [B, T, ..., R] in the dtype of `x`.
  """
  angles = angles.reshape(*angles.shape[:2], *(1,) * (x.ndim - 3), angles.shape[-1])
  cos, sin = jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  even, odd = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
  return turned.reshape(x.shape).astype(x.dtype)


def axial_angles(coordinates: jax.Array, dim: int, theta: float) -> jax.Array:
  """Returns the angle of each pair of channels where a place has several coordinates.

  Each axis turns a share of the pairs, the first ones those of the first axis; where they cannot be
  shared evenly, the first axes have one more.

  Args:
    coordinates: [B, T, A] int32 or float32.
    dim: channels R.
    theta: base of the frequencies of every axis.

  Returns:
    [B, T, R / 2] float32 radians.

  Source: Heo et al., arXiv 2403.13298, section 3.2 (axial frequencies).
  """
  axes = coordinates.shape[-1]
  shares = [len(part) for part in np.array_split(np.arange(dim // 2), axes)]
  places = coordinates.astype(jnp.float32)
  parts = [
    places[..., axis, None] * rope_frequencies(2 * share, theta)
    for axis, share in enumerate(shares)
  ]
  return jnp.concatenate(parts, axis=-1)


def rotate_halves(
  x: jax.Array, positions: jax.Array, frequencies: np.ndarray, magnitude: float = 1.0
) -> jax.Array:
  """Turns each pair of channels (k, k + R / 2) by position × frequency k.

  The other layout of the same rotation: that of the indexer of DeepSeek-V3.2. Arguments and result
  [B, T, ..., R] are those of `rotate`.

  Source: Su et al., arXiv 2104.09864, equation 34 (half-split layout).
  """
  pairs = jnp.stack(jnp.split(x, 2, axis=-1), axis=-1).reshape(x.shape)
  turned = rotate(pairs, positions, frequencies, magnitude).reshape(*x.shape[:-1], -1, 2)
  return jnp.concatenate([turned[..., 0], turned[..., 1]], axis=-1)
