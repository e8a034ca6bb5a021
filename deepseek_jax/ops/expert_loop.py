"""SwiGLU experts on a CPU: one loop over experts, one product for each block of their rows.

Rows are cut into blocks as in `kernels/grouped_cpu.py`. Everything that happens to a block happens
while it is in the cache, and the gradient is a loop of its own: kept for it are the products of
gate and up.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.expert_rows import Layout, sort_by_expert
from deepseek_jax.ops.kernels.grouped_cpu import dot, each_block, pick, read, write
from deepseek_jax.ops.norm import swiglu


def _gather(array: jax.Array, index: jax.Array) -> jax.Array:
  """Picks rows that are known to exist: nothing is compared, nothing filled in."""
  return array.at[index].get(mode='promise_in_bounds')


def _add(total: jax.Array, rows: jax.Array, index: jax.Array) -> jax.Array:
  """Adds each row to that of its token: nothing as large as all rows is ever written."""
  return total.at[index].add(rows, mode='promise_in_bounds')


def _own(start: jax.Array, size: int, end: jax.Array) -> jax.Array:
  """Says of each row of a block [size, 1] whether it is the expert's, and not the next one's."""
  return (start + jnp.arange(size) < end)[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def loop_over_experts(
  x: jax.Array,
  experts: jax.Array,
  weights: jax.Array,
  gate: jax.Array,
  up: jax.Array,
  down: jax.Array,
  blocks: tuple[int, ...],
) -> jax.Array:
  """Runs every token through its experts and sums what they say, with weights.

  Args:
    x: [N, D] tokens.
    experts: [N, K] int32 chosen experts, from 0 to E; E is nobody.
    weights: [N, K] float32 weights of the choices.
    gate: [E, D, F] in the dtype of `x`.
    up: [E, D, F].
    down: [E, F, D].
    blocks: rows multiplied at once, largest first.

  Returns:
    [N, D] in the dtype of `x`.

  Source: DeepSeekMoE, arXiv 2401.06066, equation 9; SwiGLU: Shazeer, arXiv 2002.05202.
  """
  if experts.size <= gate.shape[0]:
    return _each_choice(x, experts, weights, gate, up, down)
  return _forward(x, experts, weights, gate, up, down, blocks)[0]


def _row_facts(weights: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the token and the weight (0 on padding) of every row [R], and each expert's end [E]."""
  tokens, top_k = weights.shape
  token = jnp.minimum(layout.pair // top_k, tokens - 1)
  weight = jnp.take(weights.reshape(-1), layout.pair, mode='fill', fill_value=0)
  return token, weight, jnp.cumsum(layout.sizes)


def _each_choice(x, experts, weights, gate, up, down):
  """Takes the few choices one by one: sorting them, and blocks of padding, would cost more.

  What it costs is to read the matrices, once for each choice. That of nobody reads the last
  expert's in vain.
  """
  chosen, real = experts.reshape(-1), experts.reshape(-1) < gate.shape[0]
  factors = weights.reshape(-1)

  def choice(c, total):
    n = c // experts.shape[1]
    g, u, d = (pick(w, chosen[c]) for w in (gate, up, down))
    token = read(x, n, 1)
    products = (dot(token, w, (1, 0)).astype(x.dtype) for w in (g, u))
    result = jnp.where(real[c], dot(swiglu(*products), d, (1, 0)) * factors[c], 0)
    return write(total, read(total, n, 1) + result, n)

  total = lax.fori_loop(0, chosen.size, choice, jnp.zeros(x.shape, jnp.float32))
  return total.astype(x.dtype)


def _forward(x, experts, weights, gate, up, down, blocks):
  layout = sort_by_expert(experts, gate.shape[0], padding=blocks[0])
  token, weight, ends = _row_facts(weights, layout)

  def expert(e, carry):
    w_gate, w_up, w_down = (pick(w, e) for w in (gate, up, down))

    def block(start, size, carry):
      total, gates, ups = carry
      index, own = read(token, start, size), _own(start, size, ends[e])
      tokens = _gather(x, index)
      g, u = (dot(tokens, w, (1, 0)).astype(x.dtype) for w in (w_gate, w_up))
      result = dot(swiglu(g, u), w_down, (1, 0)) * read(weight, start, size)[:, None]
      return (
        _add(total, jnp.where(own, result, 0), index),
        write(gates, g, start),
        write(ups, u, start),
      )

    return each_block(blocks, ends[e] - layout.sizes[e], ends[e], block, carry)

  rows, (count, _, hidden) = token.shape[0], gate.shape
  # Sums over a token's experts stay float32 until the last one is in.
  start = (jnp.zeros(x.shape, jnp.float32), *(jnp.zeros((rows, hidden), x.dtype) for _ in range(2)))
  total, gates, ups = lax.fori_loop(0, count, expert, start)
  return total.astype(x.dtype), (x, weights, layout, gate, up, down, gates, ups)


def _backward(blocks, saved, grad):
  x, weights, layout, gate, up, down, gates, ups = saved
  token, weight, ends = _row_facts(weights, layout)

  def expert(e, carry):
    grad_x, grad_weight, d_gate, d_up, d_down = carry
    # Transposed once for all blocks of the expert: the products below then read rows in order. The
    # barrier keeps the compiler from folding the transposition back into them.
    both = jnp.concatenate([pick(gate, e).T, pick(up, e).T])
    both, from_out = lax.optimization_barrier((both, pick(down, e).T))

    def block(start, size, carry):
      grad_x, grad_weight, d_both, d_down = carry
      index = read(token, start, size)
      parts = _pull_block(
        _gather(x, index),
        _gather(grad, index),
        read(weight, start, size)[:, None],
        _own(start, size, ends[e]),
        (read(gates, start, size), read(ups, start, size)),
        (both, from_out),
      )
      return (
        _add(grad_x, parts[0], index),
        write(grad_weight, parts[1], start),
        d_both + parts[2],
        d_down + parts[3],
      )

    # Sums over the blocks of an expert stay float32 until the last one is in.
    sums = (jnp.zeros(both.shape[::-1], jnp.float32), jnp.zeros(from_out.shape[::-1], jnp.float32))
    first = ends[e] - layout.sizes[e]
    found = each_block(blocks, first, ends[e], block, (grad_x, grad_weight, *sums))
    parts = zip((d_gate, d_up, d_down), (*jnp.split(found[2], 2, axis=1), found[3]), strict=True)
    grads = (
      lax.dynamic_update_index_in_dim(whole, part.astype(whole.dtype), e, 0)
      for whole, part in parts
    )
    return *found[:2], *grads

  rows = token.shape[0]
  empty = [jnp.zeros_like(w) for w in (gate, up, down)]
  start = (jnp.zeros(x.shape, jnp.float32), jnp.zeros(rows, jnp.float32), *empty)
  grad_x, grad_weight, *grads = lax.fori_loop(0, gate.shape[0], expert, start)
  grad_weight = jnp.where(jnp.arange(rows) < ends[-1], grad_weight, 0)
  grad_weights = _gather(grad_weight, layout.row).astype(weights.dtype)
  return grad_x.astype(x.dtype), None, grad_weights, *grads


def _pull_block(tokens, back, factor, own, saved, transposed):
  """Gradients of the R rows of one block of an expert.

  Args:
    tokens: [R, D] inputs of the expert.
    back: [R, D] gradients of the tokens that the rows belong to.
    factor: [R, 1] weight of each row.
    own: [R, 1] bool, False where a row is the next expert's.
    saved: products of gate and up, each [R, F].
    transposed: gate and up, one below the other [2F, D], and down [D, F].

  Returns:
    Gradients of the inputs [R, D], of the weights of the rows [R], of gate beside up [D, 2F] and of
    down [F, D].
  """
  both, from_out = transposed
  hidden, pull = jax.vjp(swiglu, *saved)
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


loop_over_experts.defvjp(_forward, _backward)
