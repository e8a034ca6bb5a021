"""Dense feed-forward layers."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.bias import Bias, add_bias
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.weights import weight
from deepseek_jax.ops.linear import linear
from deepseek_jax.ops.norm import swiglu


@runtime_checkable
class Remembering(Protocol):
  """The config of a feed-forward, or of a router in it, that knows a row's earlier tokens.

  Most know each token alone. A module of one that does is given a cache in generation, as
  attention is; a feed-forward then returns `(y, cache)`.
  """

  def empty_cache(self, batch: int, length: int, dtype: DTypeLike, spare: int = 0) -> Any:
    """Returns the cache [B, …] of `batch` rows that have no token yet; None where it needs none.

    Of the tokens fed last, up to `spare` can be taken back, as from the cache of attention.
    """


def limit_faults(limit: float | None) -> list[str]:
  """Returns what is wrong with a limit of what units make, as messages."""
  if limit is None or limit > 0:
    return []
  return [f'`limit` is {limit}; expected a number above 0, or None']


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwiGLU:
  """A gated feed-forward layer, every token through all of it.

  Attributes:
    hidden: hidden units F.
    limit: largest gate, and largest magnitude of what is gated, before they are multiplied (V4:
      10); None is none.

  Source of the limit: DeepSeek-V4, arXiv 2606.19348, its section on the stability of training.
  """

  hidden: int
  limit: float | None = None

  def __post_init__(self):
    errors = limit_faults(self.limit)
    if self.hidden < 1:
      errors.append(f'`hidden` is {self.hidden}; expected at least 1 hidden unit')
    if errors:
      raise ConfigError(errors)

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return SwiGLUFeedForward(self, name=name)


class SwiGLUFeedForward(nn.Module):
  """[B, T, D] -> [B, T, D].

  Source: Shazeer, arXiv 2002.05202.
  """

  config: SwiGLU

  @nn.compact
  def __call__(self, x: jax.Array, context: Context) -> jax.Array:
    """Applies the layer to `x` [B, T, D]."""
    width, hidden = x.shape[-1], self.config.hidden
    gate = weight(self, 'gate', (width, hidden), ('embed', 'mlp'), dtype=x.dtype)
    up = weight(self, 'up', (width, hidden), ('embed', 'mlp'), dtype=x.dtype)
    down = weight(self, 'down', (hidden, width), ('mlp', 'embed'), dtype=x.dtype)
    parts = (linear(x, matrix) for matrix in (gate, up))
    h = swiglu(*parts, limit=self.config.limit)
    return linear(h, down)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GELU:
  """The Gaussian error linear unit, by the error function.

  Source: Hendrycks & Gimpel, arXiv 1606.08415, equation 1.
  """

  def apply(self, x: jax.Array) -> jax.Array:
    """Returns x · Φ(x) of `x` [...]."""
    return jax.nn.gelu(x, approximate=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TanhGELU:
  """The Gaussian error linear unit, by its approximation with a hyperbolic tangent.

  Source: Hendrycks & Gimpel, arXiv 1606.08415, section 2.
  """

  def apply(self, x: jax.Array) -> jax.Array:
    """Returns about x · Φ(x) of `x` [...]."""
    return jax.nn.gelu(x, approximate=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLP:
  """Two matrices with a unit between them: the feed-forward layer of most encoders.

  Attributes:
    hidden: hidden units F.
    unit: what each hidden unit does.
    bias: offsets beside both matrices, or None.

  Source: Vaswani et al., arXiv 1706.03762, section 3.3.
  """

  hidden: int
  unit: GELU | TanhGELU = GELU()
  bias: Bias | None = Bias()

  def __post_init__(self):
    if self.hidden < 1:
      raise ConfigError(f'`hidden` is {self.hidden}; expected at least 1 hidden unit')

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return MLPFeedForward(self, name=name)


class MLPFeedForward(nn.Module):
  """[B, T, D] -> [B, T, D]."""

  config: MLP

  @nn.compact
  def __call__(self, x: jax.Array, context: Context) -> jax.Array:
    """Applies the layer to `x` [B, T, D]."""
    c, width = self.config, x.shape[-1]
    up = weight(self, 'up', (width, c.hidden), ('embed', 'mlp'), dtype=x.dtype)
    h = add_bias(c.bias, self, 'up_bias', linear(x, up), ('mlp',))
    down = weight(self, 'down', (c.hidden, width), ('mlp', 'embed'), dtype=x.dtype)
    y = linear(c.unit.apply(h), down)
    return add_bias(c.bias, self, 'down_bias', y, (None,))
