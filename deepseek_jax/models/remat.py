"""What the backward pass recomputes instead of remembering."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from deepseek_jax.core.config import ConfigError
from deepseek_jax.models.plan import Segment, unroll

SAVED_NAMES = ('attention', 'feed_forward')
"""Activations that a block marks: the outputs [B, T, D] of its two sublayers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryLayer:
  """Remembers the stream between scan steps and recomputes what is inside a layer."""

  def regroup(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Returns the plan as it is."""
    return tuple(segments)

  def wrap(self, module: Any, scanned: bool) -> Any:
    """Returns the module class with rematerialisation."""
    return nn.remat(module, prevent_cse=not scanned)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquareRoot:
  """Remembers the stream every √L layers, and recomputes √L layers at a time.

  Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
  """

  def regroup(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Returns a plan whose scan steps run about √L layers each."""
    longest = max(part.repeats for part in segments)
    return unroll(segments, max(math.isqrt(longest), 1))

  def wrap(self, module: Any, scanned: bool) -> Any:
    """Returns the module class with rematerialisation."""
    return nn.remat(module, prevent_cse=not scanned)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Save:
  """Remembers the named activations and recomputes the others.

  Attributes:
    names: from `attention` and `feed_forward`, the outputs of a block's sublayers.
  """

  names: tuple[str, ...] = ('attention',)

  def __post_init__(self):
    wrong = [name for name in self.names if name not in SAVED_NAMES]
    if wrong:
      raise ConfigError(f'`names` has {wrong}; blocks mark {", ".join(SAVED_NAMES)}')

  def regroup(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Returns the plan as it is."""
    return tuple(segments)

  def wrap(self, module: Any, scanned: bool) -> Any:
    """Returns the module class with rematerialisation."""
    policy = jax.checkpoint_policies.save_only_these_names(*self.names)
    return nn.remat(module, prevent_cse=not scanned, policy=policy)


Remat = EveryLayer | SquareRoot | Save
