"""Which weights are matrices, read off the logical names of their axes.

An optimizer treats a matrix otherwise than a vector: matrices decay, and Muon orthogonalises them.
A stored array may hold many matrices (one a layer, one an expert), and one side of a matrix may be
stored as two axes (heads and head size). The rules, applied in this order:

1. Axes that only count copies (`BATCH_AXES`) are dropped. In last place after an ordinary axis
   such a name is no count of copies but what the matrix maps to: the router's
   `('embed', 'expert')` is one matrix, the experts' `('expert', 'embed', 'expert_mlp')` are many.
2. An unnamed axis directly after 'heads' is the head size, and the two form one side.
3. What remains are the sides. Two make a matrix: the first is its input, the second its output.
"""

from collections.abc import Callable
from typing import Any

import jax
from optax.contrib import MuonDimensionNumbers

BATCH_AXES = frozenset({'layers', 'stage', 'expert', 'lanes'})

# A vector stays a vector however it is stored, for instance one norm per head and lane.
_VECTOR_SUFFIXES = ('bias', 'scale', 'norm')

type Axes = tuple[str | None, ...]


def matrix_sides(axes: Axes) -> tuple[tuple[int, ...], ...]:
  """Groups the axes of one weight into the sides of the matrices it holds.

  Args:
    axes: logical names, for instance ('layers', 'embed', 'heads', None).

  Returns:
    One tuple of axis numbers a side, for instance ((1,), (2, 3)); empty for a scalar.
  """
  counts_copies = [name in BATCH_AXES for name in axes]
  if counts_copies and not all(counts_copies[:-1]):
    counts_copies[-1] = False
  sides: list[tuple[int, ...]] = []
  for axis, name in enumerate(axes):
    if counts_copies[axis]:
      continue
    if name is None and axis > 0 and axes[axis - 1] == 'heads':
      sides[-1] += (axis,)
    else:
      sides.append((axis,))
  return tuple(sides)


def decay_mask(axes_tree: Any) -> Any:
  """Says for every weight whether weight decay applies: to matrices, embeddings included.

  Args:
    axes_tree: like the parameters, with a tuple of axis names for each leaf.

  Returns:
    A tree of bool of the same structure.
  """
  return _map_axes(
    lambda address, axes: not _is_vector(address) and len(matrix_sides(axes)) >= 2, axes_tree
  )


def muon_dimensions(axes_tree: Any) -> Any:
  """Says for every weight how Muon reads it as matrices, or that it does not.

  Weights with a vocabulary axis (embedding and output head) and vectors are left to AdamW.

  Args:
    axes_tree: like the parameters, with a tuple of axis names for each leaf.

  Returns:
    A tree of `MuonDimensionNumbers`, or None where AdamW takes the weight.

  Raises:
    ValueError: a weight has three sides or more; the message holds its address.

  Source: DeepSeek-V4 (arXiv 2606.19348), its section on the optimizer: AdamW keeps embedding,
    head, static biases and norms, Muon takes every other matrix, each expert's by itself.
  """

  def classify(address: str, axes: Axes) -> MuonDimensionNumbers | None:
    sides = matrix_sides(axes)
    if _is_vector(address) or 'vocab' in axes or len(sides) < 2:
      return None
    if len(sides) > 2:
      raise ValueError(
        f'Muon cannot read {address!r} with axes {axes} as matrices: found {len(sides)} sides, '
        f'expected 2 after dropping {sorted(BATCH_AXES)} and joining heads with head size'
      )
    return MuonDimensionNumbers(reduction_axis=sides[0], output_axis=sides[1])

  return _map_axes(classify, axes_tree)


def _is_vector(address: str) -> bool:
  """Recognises norms and biases by the last name of their address."""
  return address.rsplit('/', 1)[-1].endswith(_VECTOR_SUFFIXES)


def _map_axes(function: Callable[[str, Axes], Any], axes_tree: Any) -> Any:
  """Maps (address, axes) over a tree whose leaves are tuples of axis names."""
  return jax.tree.map_with_path(
    lambda path, axes: function(jax.tree_util.keystr(path, simple=True, separator='/'), axes),
    axes_tree,
    is_leaf=lambda node: isinstance(node, tuple),
  )
