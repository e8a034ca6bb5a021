"""Experts' matrices, and rows sorted by expert: where each choice lies, there and back."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.ops.norm import swiglu

MATRICES = ('gate', 'up', 'down')
"""Of an expert, by name."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=MATRICES, meta_fields=['limit'])
@dataclasses.dataclass(frozen=True)
class ExpertWeights:
  """SwiGLU weights of all experts, and the limit of what they make: see `swiglu`.

  Attributes:
    gate: [E, D, F].
    up: [E, D, F].
    down: [E, F, D].
    limit: a number, or None.
  """

  gate: jax.Array
  up: jax.Array
  down: jax.Array
  limit: float | None = None

  def __iter__(self) -> Iterator[jax.Array]:
    """Yields gate, up and down."""
    return iter((self.gate, self.up, self.down))

  def gated(self, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns hidden units [..., F] of what `gate` and `up` make of a token."""
    return swiglu(gate, up, limit=self.limit)

  def of(self, gate: jax.Array, up: jax.Array, down: jax.Array) -> 'ExpertWeights':
    """Returns other matrices, or gradients of these, with the same limit."""
    return ExpertWeights(gate, up, down, self.limit)


class Products(NamedTuple):
  """What experts' gates and ups make of the sorted rows, [R, F] each; zero on nobody's rows."""

  gate: jax.Array
  up: jax.Array


class Layout(NamedTuple):
  """Where each (token, choice) pair lies among the rows sorted by expert.

  Attributes:
    pair: [R] int32, R = N · K, the flat index n · K + k of the pair in each row.
    row: [N, K] int32, the row of each pair; pairs that are nobody's lie behind the last expert's.
    sizes: [E] int32, rows of each expert.
  """

  pair: jax.Array
  row: jax.Array
  sizes: jax.Array


def sort_by_expert(experts: jax.Array, count: int) -> Layout:
  """Gives every (token, choice) pair a row, so that each expert has a run of rows.

  Args:
    experts: [N, K] int32; `count` is nobody. Those rows come last and are nobody's.
    count: number of experts E.
  """
  tokens, top_k = experts.shape
  pairs = tokens * top_k
  flat = experts.reshape(-1)
  order = jnp.argsort(flat, stable=True).astype(jnp.int32)
  sizes = jnp.zeros(count, jnp.int32).at[flat].add(1)
  row = jnp.zeros(pairs, jnp.int32).at[order].set(jnp.arange(pairs), unique_indices=True)
  return Layout(order, row.reshape(tokens, top_k), sizes)


@jax.custom_vjp
def spread(x: jax.Array, layout: Layout) -> jax.Array:
  """Copies tokens [N, D] to their rows [R, D].

  The gradient is a gather too (each token sums its K rows): accelerators scatter slowly.
  """
  return jnp.take(x, layout.pair // layout.row.shape[1], axis=0)


def _spread_forward(x, layout):
  return spread(x, layout), layout


def _spread_backward(layout, grad):
  rows = jnp.take(grad, layout.row, axis=0)
  return jnp.sum(rows.astype(jnp.float32), axis=1).astype(grad.dtype), None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def combine(rows: jax.Array, weights: jax.Array, layout: Layout) -> jax.Array:
  """Sums for each token its K rows [R, D] with weights [N, K] float32, giving [N, D].

  The sum is float32: the order in which experts are added must not show.
  """
  picked = jnp.take(rows, layout.row, axis=0)
  total = jnp.einsum('nkd,nk->nd', picked, weights, preferred_element_type=jnp.float32)
  return total.astype(rows.dtype)


def _combine_forward(rows, weights, layout):
  return combine(rows, weights, layout), (rows, weights, layout)


def _combine_backward(saved, grad):
  rows, weights, layout = saved
  top_k = weights.shape[1]
  weight = jnp.take(weights.reshape(-1), layout.pair)
  back = jnp.take(grad, layout.pair // top_k, axis=0)
  grad_rows = (back.astype(jnp.float32) * weight[:, None]).astype(rows.dtype)
  picked = jnp.take(rows, layout.row, axis=0)
  grad_weights = jnp.einsum('nkd,nd->nk', picked, grad, preferred_element_type=jnp.float32)
  return grad_rows, grad_weights.astype(weights.dtype), None


combine.defvjp(_combine_forward, _combine_backward)
