"""Which weights a run trains: those whose canonical address fits a pattern; the rest is frozen."""

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.config import did_you_mean
from deepseek_jax.core.tree import flatten, unflatten
from deepseek_jax.models.decoder import canonical, grouped
from deepseek_jax.models.plan import Segment


def check_patterns(
  patterns: Sequence[str] | None, params: Any, segments: Sequence[Segment]
) -> list[str]:
  """Returns a message for every pattern that fits no weight.

  Args:
    patterns: as `Experiment.trainable` has them.
    params: the parameters or their shapes.
    segments: the plan of the stack.
  """
  addresses = list(flatten(canonical(params, segments)))
  return [
    f'trainable: no weight is called {pattern!r}{did_you_mean(pattern, addresses)}'
    f'; weights are called such as {addresses[-1]!r}'
    for pattern in patterns or ()
    if not fnmatch.filter(addresses, pattern)
  ]


def trainable_part(
  patterns: Sequence[str] | None, params: Any, segments: Sequence[Segment]
) -> Callable[[Any], Any]:
  """Returns the function that sets to zero what belongs to frozen weights.

  Where a whole array is frozen, zeros take its place, and the compiler drops what made it. Layers
  that share a scan are frozen one by one.

  Args:
    patterns: of canonical addresses, such as 'layers/*/attention/indexer/*'; None is all weights.
    params: the parameters or their shapes.
    segments: the plan of the stack.

  Returns:
    A function of trees like the parameters: gradients, updates.
  """
  if patterns is None:
    return lambda tree: tree
  flat = flatten(canonical(params, segments))
  chosen = {
    address: np.asarray(any(fnmatch.fnmatchcase(address, pattern) for pattern in patterns))
    for address in flat
  }
  mask = grouped(unflatten(chosen), segments)

  def keep(leaf: jax.Array, kept: np.ndarray) -> jax.Array:
    if kept.all():
      return leaf
    if not kept.any():
      return jnp.zeros_like(leaf)
    return leaf * kept.reshape(*kept.shape, *(1,) * (leaf.ndim - kept.ndim)).astype(leaf.dtype)

  return lambda tree: jax.tree.map(keep, tree, mask)
