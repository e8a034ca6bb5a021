"""What the matrices of the routed experts are made of."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.weights import Met, weight
from deepseek_jax.ops.expert_rows import MATRICES, ExpertWeights

INWARD = ('expert', 'expert_embed', 'expert_mlp')
OUTWARD = ('expert', 'expert_mlp', 'expert_embed')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Separate:
  """Every expert has matrices of its own.

  Source: DeepSeekMoE, arXiv 2401.06066, section 3.
  """

  def matrices(
    self, module: nn.Module, experts: int, width: int, hidden: int, dtype: DTypeLike
  ) -> ExpertWeights:
    """Declares the weights in `module`: gate and up [E, D, F], down [E, F, D]."""
    return ExpertWeights(
      gate=weight(module, 'gate', (experts, width, hidden), INWARD, dtype=dtype),
      up=weight(module, 'up', (experts, width, hidden), INWARD, dtype=dtype),
      down=weight(module, 'down', (experts, hidden, width), OUTWARD, dtype=dtype),
    )

  def met(self, experts: int, top_k: int) -> dict[str, Met]:
    """Returns what a token does with each array that `matrices` declares, by name."""
    return dict.fromkeys(MATRICES, Met(top_k / experts))

  def making_flops(self, experts: int, width: int, hidden: int) -> float:
    """Returns FLOPs of making the matrices, once a forward pass: none."""
    return 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedFactor:
  """Every matrix of an expert is one that all share plus a product of two thin ones of its own.

  W_e = S + A_e B_e with A_e [D, R] and B_e [R, F], for gate, up and down alike. The matrices are
  made anew in every forward pass, from parameters that are fewer the lower the rank, so that any
  dispatch works: what is saved is memory of parameters, gradients and the optimizer, not time.
  Memory of a layer that is being computed is that of `Separate`.

  Attributes:
    rank: R. An expert has R (D + F) parameters a matrix of its own, in the place of D F.
    own: share of a fresh matrix's variance that is the expert's own; the rest is shared. The sum
      is as large as a matrix of `Separate`.

  Source: the low-rank form is that of Hu et al. (LoRA), arXiv 2106.09685, equation 3, with both
    factors away from zero at first, so that experts differ.
  """

  rank: int
  own: float = 0.5

  def __post_init__(self):
    errors = []
    if self.rank < 1:
      errors.append(f'`rank` is {self.rank}; expected 1 or more')
    if not 0 < self.own < 1:
      errors.append(f'`own` is {self.own}; expected a share between 0 and 1')
    if errors:
      raise ConfigError(errors)

  def matrices(
    self, module: nn.Module, experts: int, width: int, hidden: int, dtype: DTypeLike
  ) -> ExpertWeights:
    """Declares the factors in `module`, and returns gate and up [E, D, F], down [E, F, D]."""

    def make(name: str, rows: int, columns: int, axes: tuple[str, str, str]) -> jax.Array:
      expert, inward, outward = axes
      # The axes of the sum: every device makes its own slice of it, and nothing moves for that.
      shared = weight(
        module,
        f'{name}_shared',
        (rows, columns),
        (inward, outward),
        dtype=jnp.float32,
        gain=math.sqrt(1 - self.own),
      )
      first = (experts, rows, self.rank), (expert, inward, None)
      second = (experts, self.rank, columns), (expert, None, outward)
      a = weight(module, f'{name}_in', *first, dtype=dtype)
      b = weight(module, f'{name}_out', *second, dtype=dtype, gain=math.sqrt(self.own))
      return _add_product(shared, a, b).astype(dtype)

    return ExpertWeights(
      gate=make('gate', width, hidden, INWARD),
      up=make('up', width, hidden, INWARD),
      down=make('down', hidden, width, OUTWARD),
    )

  def met(self, experts: int, top_k: int) -> dict[str, Met]:
    """Returns what a token does with each array that `matrices` declares, by name.

    It meets the shared matrix once, as a parameter, and is multiplied with it in each of its
    experts; the thin matrices are multiplied with each other and with no token.
    """
    found = {}
    for name in MATRICES:
      found[f'{name}_shared'] = Met(1.0, products=top_k)
      found[f'{name}_in'] = found[f'{name}_out'] = Met(top_k / experts, products=0.0)
    return found

  def making_flops(self, experts: int, width: int, hidden: int) -> float:
    """Returns FLOPs of making the matrices, once a forward pass whatever its tokens."""
    return 3 * experts * width * hidden * (2.0 * self.rank + 1)


def _add_product(shared: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns shared [D, F] + a [E, D, R] · b [E, R, F] in float32, [E, D, F].

  An expert whose factors are not finite is not finite as a whole, but none of its gradient is: the
  gradient of one factor is a product with the other, and 0 · NaN would spoil the step.
  """
  finite = jnp.isfinite(_sums(a) + _sums(b))[:, None, None]
  a, b = jnp.where(finite, a, 0), jnp.where(finite, b, 0)
  own = jnp.einsum('edr,erf->edf', a, b, preferred_element_type=jnp.float32)
  return jnp.where(finite, shared + own, jnp.nan)


def _sums(x: jax.Array) -> jax.Array:
  return jnp.sum(jnp.abs(jax.lax.stop_gradient(x)), axis=(1, 2), dtype=jnp.float32)
