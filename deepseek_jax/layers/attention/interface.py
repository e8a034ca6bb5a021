"""What every attention kind offers; any object that does fits in a `Block`."""

from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from deepseek_jax.layers.context import Context
from deepseek_jax.layers.context_parallel import Contiguous, Order

Cache = Any
"""A pytree of arrays that one kind understands; its first axis is the batch."""


@runtime_checkable
class AttentionConfig(Protocol):
  """The config of an attention kind."""

  @property
  def heads(self) -> int:
    """Number of query heads H."""

  def build(self, name: str | None = None) -> nn.Module:
    """Returns a module `(x [B, T, D], context, cache) -> (y [B, T, D], cache)`.

    Without a cache, tokens see the tokens of their own segment in `x`. With one, row b of `x`
    continues the sequence whose earlier tokens the cache holds: `context.positions` says where,
    and tokens of segment 0 (padding) leave no trace.
    """

  def empty_cache(self, batch: int, length: int, dtype: DTypeLike, spare: int = 0) -> Cache:
    """Returns the cache of `batch` sequences of up to `length` tokens, holding nothing.

    Of the tokens fed last, up to `spare` can be taken back: feeding then goes on at an earlier
    position, and gives what it would have given without them.

    Raises:
      ConfigError: `spare` is not 0, and this kind cannot take tokens back.
    """

  def cache_axes(self) -> Any:
    """Returns the logical axis names of the cache: its structure, tuples as leaves."""

  def mixing_flops(self, length: int) -> float:
    """Returns forward FLOPs a token of mixing values over `length` causal tokens, on average.

    Projections are not in it: they are counted from the weights.
    """


@runtime_checkable
class SharesRows(Protocol):
  """A kind that says on which devices that share a row it can run.

  Others are left to the compiler, and take `Contiguous` tokens only.
  """

  def check_shared(self, tokens: int, order: Order) -> list[str]:
    """Returns why devices cannot hold `tokens` tokens of a row each, in this order, as messages."""


def in_order_only(order: Order, need: str) -> list[str]:
  """Returns that a kind cannot take tokens but in the order of the row, unless they are in it."""
  if isinstance(order, Contiguous):
    return []
  return [f'needs {need} beside them, which {type(order).__name__} takes apart; use Contiguous()']


def block_faults(block: int, tokens: int, order: Order, name: str) -> list[str]:
  """Returns why blocks of queries cannot lie on devices with `tokens` tokens each, as messages."""
  errors = in_order_only(order, 'the tokens of a block')
  if tokens % block:
    errors.append(
      f'`{name}` is {block}, which does not divide the {tokens} tokens of a row on a device'
    )
  return errors


class Attention(Protocol):
  """The module of an attention kind."""

  def __call__(
    self, x: jax.Array, context: Context, cache: Cache | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Mixes `x` [B, T, D] along T."""
