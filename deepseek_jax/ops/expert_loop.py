"""SwiGLU experts on a CPU: one loop over experts, one product for each block of their rows.

Rows are cut into blocks as in `kernels/grouped_cpu.py`. Everything that happens to a block happens
while it is in the cache: its tokens are fetched, and its results added to those of its tokens, so
that nothing as large as all rows times the width is ever written.
"""

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.expert_rows import ExpertWeights, Layout, Products
from deepseek_jax.ops.kernels.grouped_cpu import (
  blocks_within,
  dot,
  each_block,
  inside,
  pick,
  read,
  write,
)


def each_choice(
  x: jax.Array, experts: jax.Array, weights: jax.Array, matrices: ExpertWeights
) -> jax.Array:
  """Takes a few choices one by one: sorting them, and blocks of padding, would cost more.

  What it costs is to read the matrices, once for each choice; those of nobody read none.

  Args:
    x: [N, D] tokens.
    experts: [N, K] int32, from 0 to E; E is nobody.
    weights: [N, K] float32.
    matrices: of the E experts.

  Returns:
    [N, D] in the dtype of `x`.
  """
  chosen, factors = experts.reshape(-1), weights.reshape(-1)
  # A lone bfloat16 row goes through a plain loop in XLA:CPU, two through a library.
  copies = 2 if x.dtype == jnp.bfloat16 else 1

  def product(c, total):
    n = c // experts.shape[1]
    gate, up, down = (pick(w, chosen[c]) for w in matrices)
    token = jnp.concatenate([read(x, n, 1)] * copies)
    products = (dot(token, w, (1, 0)).astype(x.dtype) for w in (gate, up))
    result = dot(matrices.gated(*products), down, (1, 0))[:1] * factors[c]
    return write(total, read(total, n, 1) + result, n)

  def choice(c, total):
    return lax.cond(chosen[c] < len(matrices.gate), product, lambda _, same: same, c, total)

  total = lax.fori_loop(0, chosen.size, choice, jnp.zeros(x.shape, jnp.float32))
  return total.astype(x.dtype)


def loop_forward(
  x: jax.Array, weights: jax.Array, layout: Layout, matrices: ExpertWeights
) -> tuple[jax.Array, Products]:
  """Runs every token through its experts and sums what they say, with weights.

  Args:
    x: [N, D] tokens.
    weights: [N, K] float32 weights of the choices.
    layout: where the R = N · K choices lie.
    matrices: of the E experts, in the dtype of `x`.

  Returns:
    [N, D] in the dtype of `x`; and the products of gate and up, for the gradient.
  """
  token, weight, ends = _row_facts(weights, layout)
  rows, (count, _, hidden) = len(token), matrices.gate.shape
  blocks = blocks_within(rows, count)

  def expert(e, carry):
    gate, up, down = (pick(w, e) for w in matrices)

    def block(start, size, carry):
      total, *products = carry
      start, own = inside(start, size, ends[e], rows)
      index = read(token, start, size)
      tokens = _gather(x, index)
      found = [dot(tokens, w, (1, 0)).astype(x.dtype) for w in (gate, up)]
      result = dot(matrices.gated(*found), down, (1, 0)) * read(weight, start, size)[:, None]
      kept = (
        write(all_rows, jnp.where(own, new, read(all_rows, start, size)), start)
        for all_rows, new in zip(products, found)
      )
      return _add(total, jnp.where(own, result, 0), index), *kept

    return each_block(blocks, ends[e] - layout.sizes[e], ends[e], block, carry)

  # Sums over a token's experts stay float32 until the last one is in.
  start = (jnp.zeros(x.shape, jnp.float32), *(jnp.zeros((rows, hidden), x.dtype) for _ in range(2)))
  total, *products = lax.fori_loop(0, count, expert, start)
  return total.astype(x.dtype), Products(*products)


def loop_backward(
  x: jax.Array,
  weights: jax.Array,
  layout: Layout,
  products: Products,
  matrices: ExpertWeights,
  grad: jax.Array,
) -> tuple[jax.Array, jax.Array, ExpertWeights]:
  """Gradients of `loop_forward`.

  Args:
    x: [N, D] tokens.
    weights: [N, K] float32.
    layout: where the choices lie.
    products: of gate and up, as `loop_forward` returned them.
    matrices: of the E experts.
    grad: [N, D] gradient of the sums.

  Returns:
    Gradients of the tokens [N, D], of the weights [N, K] and of the matrices.
  """
  token, weight, ends = _row_facts(weights, layout)
  rows, count = len(token), len(matrices.gate)
  blocks = blocks_within(rows, count)

  def expert(e, carry):
    # Transposed once for all blocks of the expert: the products below then read rows in order. The
    # barrier keeps the compiler from folding the transposition back into them.
    both = jnp.concatenate([pick(matrices.gate, e).T, pick(matrices.up, e).T])
    both, from_out = lax.optimization_barrier((both, pick(matrices.down, e).T))

    def block(start, size, carry):
      grad_x, grad_weight, d_both, d_down = carry
      start, own = inside(start, size, ends[e], rows)
      index = read(token, start, size)
      parts = _pull_block(
        _gather(x, index),
        _gather(grad, index),
        read(weight, start, size)[:, None],
        own,
        tuple(read(p, start, size) for p in products),
        (both, from_out),
        matrices.gated,
      )
      kept = jnp.where(own[:, 0], parts[1], read(grad_weight, start, size))
      return (
        _add(grad_x, parts[0], index),
        write(grad_weight, kept, start),
        d_both + parts[2],
        d_down + parts[3],
      )

    # Sums over the blocks of an expert stay float32 until the last one is in.
    sums = (jnp.zeros(both.shape[::-1], jnp.float32), jnp.zeros(from_out.shape[::-1], jnp.float32))
    first, (grad_x, grad_weight, *grads) = ends[e] - layout.sizes[e], carry
    *found, d_both, d_down = each_block(blocks, first, ends[e], block, (grad_x, grad_weight, *sums))
    parts = (*jnp.split(d_both, 2, axis=1), d_down)
    grads = (
      lax.dynamic_update_index_in_dim(whole, part.astype(whole.dtype), e, 0)
      for whole, part in zip(grads, parts, strict=True)
    )
    return *found, *grads

  empty = [jnp.zeros_like(w) for w in matrices]
  start = (jnp.zeros(x.shape, jnp.float32), jnp.zeros(rows, jnp.float32), *empty)
  grad_x, grad_weight, *grads = lax.fori_loop(0, count, expert, start)
  grad_weights = _gather(grad_weight, layout.row).astype(weights.dtype)
  return grad_x.astype(x.dtype), grad_weights, matrices.of(*grads)


def _gather(array: jax.Array, index: jax.Array) -> jax.Array:
  """Picks rows that are known to exist: nothing is compared, nothing filled in."""
  return array.at[index].get(mode='promise_in_bounds')


def _add(total: jax.Array, rows: jax.Array, index: jax.Array) -> jax.Array:
  """Adds each row to that of its token."""
  return total.at[index].add(rows, mode='promise_in_bounds')


def _row_facts(weights: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the token and the weight of every row [R], and each expert's end [E]."""
  return (
    layout.pair // weights.shape[1],
    _gather(weights.reshape(-1), layout.pair),
    jnp.cumsum(layout.sizes),
  )


def _pull_block(tokens, back, factor, own, saved, transposed, gated):
  """Gradients of the R rows of one block of an expert.

  Args:
    tokens: [R, D] inputs of the expert.
    back: [R, D] gradients of the tokens that the rows belong to.
    factor: [R, 1] weight of each row.
    own: [R, 1] bool, False where a row is the next expert's.
    saved: products of gate and up, each [R, F].
    transposed: gate and up, one below the other [2F, D], and down [D, F].
    gated: makes hidden units of the saved products.

  Returns:
    Gradients of the inputs [R, D], of the weights of the rows [R], of gate beside up [D, 2F] and of
    down [F, D].
  """
  both, from_out = transposed
  hidden, pull = jax.vjp(gated, *saved)
  # The gradient of a row's weight needs the row's unweighted result; h · (back downᵀ) is its
  # product with `back`, without that result.
  to_hidden = dot(back, from_out, (1, 0))
  d_weight = jnp.sum(hidden.astype(jnp.float32) * to_hidden, axis=1)
  pulled = pull(jnp.where(own, to_hidden * factor, 0).astype(tokens.dtype))
  # Gate and up side by side: one product of twice the size where there were two.
  d_both = jnp.concatenate(pulled, axis=1)
  weighted = jnp.where(own, hidden.astype(jnp.float32) * factor, 0).astype(tokens.dtype)
  return (
    dot(d_both, both, (1, 0)),
    d_weight,
    dot(tokens, d_both, (0, 0)),
    dot(weighted, back, (0, 0)),
  )
