"""Nested dicts of arrays as flat ones, and how large they are."""

import math
from collections.abc import Mapping
from typing import Any

import jax


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  """A nested dict as one level, with paths for keys: {'a': {'b': x}} → {'a/b': x}.

  Args:
    tree: nested mappings with text keys; everything else is a leaf, tuples too. Empty mappings
      leave no trace.

  Raises:
    ValueError: a key contains '/', is empty, or is no text.
  """
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if not isinstance(key, str) or not key or '/' in key:
      raise ValueError(f"key {key!r} cannot stand in a path: it must be text without '/'")
    if isinstance(value, Mapping):
      flat.update({f'{key}/{inner}': leaf for inner, leaf in flatten(value).items()})
    else:
      flat[key] = value
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The nested dict that `flatten` made flat.

  Args:
    flat: path → leaf.

  Raises:
    ValueError: a path is both a leaf and the beginning of another.
  """
  tree: dict[str, Any] = {}
  inner_nodes = {id(tree)}
  for path, leaf in flat.items():
    *parents, name = path.split('/')
    node = tree
    for parent in parents:
      if parent not in node:
        node[parent] = {}
        inner_nodes.add(id(node[parent]))
      node = node[parent]
      if id(node) not in inner_nodes:
        raise ValueError(f'{path!r} goes through a leaf')
    if name in node:
      raise ValueError(f'{path!r} is a leaf and the beginning of another path')
    node[name] = leaf
  return tree


def count(tree: Any) -> int:
  """How many numbers the arrays of a pytree hold: parameters, for a tree of parameters.

  Args:
    tree: any pytree whose leaves have a shape; `jax.ShapeDtypeStruct` will do.
  """
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def bytes_of(tree: Any) -> int:
  """How many bytes the arrays of a pytree take, over all devices together and counted once.

  Args:
    tree: any pytree whose leaves have shape and dtype; `jax.ShapeDtypeStruct` will do. Formats
      below a byte count as one byte, which is how arrays on the host hold them.
  """
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
