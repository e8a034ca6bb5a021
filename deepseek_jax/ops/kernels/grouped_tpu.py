"""Grouped products on a TPU: the Pallas kernels of `megablox` that come with JAX.

A grid step multiplies one tile of rows with one tile of the matrix of the expert that they belong
to; a tile that two experts share is visited once for each.

Source: Gale et al., MegaBlocks, arXiv 2211.15841.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

ROWS = 512
"""Rows of a tile: an expert's share is seldom larger, and smaller tiles read the matrix oftener."""
SIDE = 1024
"""Longest side of a tile of a matrix: bfloat16 tiles, twice over, then fit into 16 MB of memory."""


def tiling(rows: int, inner: int, outer: int) -> tuple[int, int, int]:
  """Returns the tile of a product [N, D] · [D, F]: rows, inner size and outer size."""
  return min(ROWS, _up(rows, 128)), min(SIDE, _up(inner, 128)), min(SIDE, _up(outer, 128))


def multiply(
  tokens: jax.Array,
  weights: jax.Array,
  sizes: jax.Array,
  *,
  transposed: bool = False,
  interpret: bool = False,
) -> jax.Array:
  """Multiplies the rows [N, D] of each expert with its matrix.

  Args:
    tokens: [N, D] rows, one expert's after the other's.
    weights: [E, D, F], or [E, F, D] transposed.
    sizes: [E] int32, rows of each expert.
    transposed: whether the matrices are.
    interpret: runs the kernel step by step on any back end: for tests.

  Returns:
    [N, F] in the dtype of `tokens`, float32 inside; zero after the last expert's rows.
  """
  rows, inner = tokens.shape
  tile = tiling(rows, inner, weights.shape[1 if transposed else 2])
  out = gmm(
    jnp.pad(tokens, ((0, _up(rows, tile[0]) - rows), (0, 0))),
    weights,
    sizes,
    preferred_element_type=tokens.dtype,
    tiling=tile,
    transpose_rhs=transposed,
    interpret=interpret,
  )
  # The kernel leaves rows that are nobody's as they were in memory.
  real = jnp.arange(rows) < jnp.sum(sizes)
  return jnp.where(real[:, None], out[:rows], 0)


def weight_gradient(
  tokens: jax.Array, grads: jax.Array, sizes: jax.Array, *, interpret: bool = False
) -> jax.Array:
  """Sums tokenᵀ · gradient over the rows of each expert, in float32.

  Args:
    tokens: [N, D].
    grads: [N, F].
    sizes: [E] int32.
    interpret: runs the kernel step by step on any back end: for tests.

  Returns:
    [E, D, F] in the dtype of `tokens`.
  """
  rows, inner = tokens.shape
  tile = tiling(rows, inner, grads.shape[1])
  more = ((0, _up(rows, tile[0]) - rows), (0, 0))
  out = tgmm(
    jnp.pad(tokens, more).T,
    jnp.pad(grads, more),
    sizes,
    preferred_element_type=tokens.dtype,
    tiling=tile,
    interpret=interpret,
  )
  # An expert without rows is never visited.
  return jnp.where((sizes > 0)[:, None, None], out, 0)


def _up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple
