"""Attention of long rows: a running softmax over blocks of queries and keys.

Each block of keys adds to a weighted sum, which is scaled down where a higher score turns up. The
gradient makes the weights of a block again from the logarithm of their sum. Nothing of the size of
all pairs is ever held. The loops are over rows and heads too, as many at a time as a CPU's caches
like.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.attention.blocks import (
  FLOOR,
  Back,
  Extras,
  Layout,
  Plan,
  Static,
  cut_keys,
  cut_queries,
  join_keys,
  join_queries,
  make_plan,
  pick,
  plan_layout,
)
from deepseek_jax.ops.attention.reference import Seen
from deepseek_jax.ops.mesh import arrays_are_whole

SIDE = 256
"""Side of a block of scores of one head."""
CELLS = 1 << 20
"""Scores of one step, 4 MB: with fewer, the loops cost more than the caches save."""


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _layout(query: jax.Array, key: jax.Array) -> Layout:
  """Where the compiler spreads the arrays over a mesh, no loop may run over rows or heads."""
  return plan_layout(query, key, SIDE, CELLS if arrays_are_whole() else None)


def forward(
  query: jax.Array, key: jax.Array, value: jax.Array, extras: Extras, seen: Seen, static: Static
) -> tuple[jax.Array, jax.Array]:
  """Returns the outputs [B, T, H, V], and the logarithm of each softmax's sum [B, T, H] float32.

  Where a query sees no key its output is zero and its logarithm `FLOOR`, so that it has no share
  where parts are merged, and gives no gradient.
  """
  c = _layout(query, key)
  plan = make_plan(seen, extras.key_bias, static.window, static.in_order, c)
  q, k, v = cut_queries(query * static.scale, c), cut_keys(key, c), cut_keys(value, c)
  sinks = None
  if extras.sinks is not None:
    sinks = jnp.repeat(extras.sinks.astype(jnp.float32), c.queries)
    sinks = sinks.reshape(c.group_steps, c.groups, c.share * c.queries, 1)

  def block(at):
    step, i = at // c.query_blocks, at % c.query_blocks
    return _forward_block(step, i, q, k, v, sinks, plan, c)

  out, log_sum = lax.map(block, jnp.arange(c.steps * c.query_blocks))
  length = query.shape[1]
  return join_queries(out, c, length), join_queries(log_sum, c, length)[..., 0]


def _forward_block(step, i, q, k, v, sinks, plan: Plan, c: Layout):
  """Outputs [rows, groups, M, V] of one block of queries, and the log of their sums [..., 1]."""
  own = step // c.group_steps
  rows = pick(q, step, i)

  def visit(hiding: bool, number, carry):
    out, top, total = carry
    j = plan.visits.order[own, i, number]
    scores = _product('bgmk,bgsk->bgms', rows, pick(k, step, j))
    if plan.key_bias is not None:
      scores += pick(plan.key_bias, own, j)[:, None, None, :]
    if hiding:
      scores += lax.optimization_barrier(plan.mask(own, i, j, c))
    higher = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - higher)
    factor = jnp.exp(top - higher)
    total = total * factor + jnp.sum(weights, axis=-1, keepdims=True)
    values = _product('bgms,bgsv->bgmv', weights.astype(v.dtype), pick(v, step, j))
    return out * factor + values, higher, total

  shape = rows.shape[:3]
  if sinks is None:
    top, total = jnp.full((*shape, 1), FLOOR, jnp.float32), jnp.zeros((*shape, 1), jnp.float32)
  else:
    top = jnp.broadcast_to(pick(sinks, step % c.group_steps), (*shape, 1))
    total = jnp.ones((*shape, 1), jnp.float32)
  carry = jnp.zeros((*shape, v.shape[-1]), jnp.float32), top, total
  whole, touched = plan.visits.whole[own, i], plan.visits.touched[own, i]
  carry = lax.fori_loop(0, whole, functools.partial(visit, False), carry)
  out, top, total = lax.fori_loop(whole, touched, functools.partial(visit, True), carry)
  empty = total == 0
  total = jnp.where(empty, 1.0, total)
  return (out / total).astype(v.dtype), jnp.where(empty, FLOOR, top + jnp.log(total))


def backward(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  extras: Extras,
  seen: Seen,
  static: Static,
  back: Back,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
  """Returns the gradients of queries, keys, values, and of the keys' bias where there is one.

  Args:
    query: [B, T, H, K], and so on as `forward` has them.
    key: [B, S, G, K].
    value: [B, S, G, V].
    extras: what joins the scores.
    seen: who sees whom.
    static: what is known when it is compiled.
    back: what it starts from.
  """
  c = _layout(query, key)
  plan = make_plan(seen, extras.key_bias, static.window, static.in_order, c)
  q, k, v = cut_queries(query * static.scale, c), cut_keys(key, c), cut_keys(value, c)
  g = cut_queries(back.grad.astype(v.dtype), c)
  sums, shifts = (jnp.swapaxes(cut_queries(x[..., None], c), -1, -2) for x in back[:2])

  def step(at):
    def block(carry, i):
      arrays = (*(pick(x, at, i) for x in (q, g, sums, shifts)), k, v)
      return _backward_block(at, i, arrays, carry, plan, c)

    bias = None
    if plan.key_bias is not None:
      bias = jnp.zeros((c.key_blocks, c.rows, c.keys), jnp.float32)
    zeros = *(jnp.zeros(x.shape[1:], jnp.float32) for x in (k, v)), bias
    return lax.scan(block, zeros, jnp.arange(c.query_blocks))

  (grad_k, grad_v, bias), grad_q = lax.map(step, jnp.arange(c.steps))
  grads = (
    (join_queries(grad_q, c, query.shape[1]) * static.scale).astype(query.dtype),
    join_keys(grad_k, c, key.shape[1]).astype(key.dtype),
    join_keys(grad_v, c, key.shape[1]).astype(value.dtype),
  )
  if bias is not None:
    bias = bias.reshape(c.row_steps, c.group_steps, c.key_blocks, c.rows, c.keys).sum(axis=1)
    bias = bias.transpose(0, 2, 1, 3).reshape(key.shape[0], -1)[:, : key.shape[1]]
  return *grads, bias


def _backward_block(step, i, arrays, carry, plan: Plan, c: Layout):
  """Adds what one block of queries gives to the gradients of the keys, and returns its own."""
  own = step // c.group_steps
  rows, back, log_sum, drift, k, v = arrays

  def add(x, part, j):
    return lax.dynamic_update_index_in_dim(x, pick(x, j) + part, j, 0)

  def visit(hiding: bool, number, carry):
    grad_q, (grad_k, grad_v, grad_bias) = carry
    j = plan.visits.order[own, i, number]
    keys, values = pick(k, step, j), pick(v, step, j)
    # Keys first, queries second: of the three products to come, two then read rows in order.
    scores = _product('bgsk,bgmk->bgsm', keys, rows)
    if plan.key_bias is not None:
      scores += pick(plan.key_bias, own, j)[:, None, :, None]
    if hiding:
      mask = plan.mask(own, i, j, c)
      scores += lax.optimization_barrier(jnp.swapaxes(mask, 2, 3))
    weights = jnp.exp(scores - log_sum)
    change = weights * (_product('bgsv,bgmv->bgsm', values, back) - drift)
    if grad_bias is not None:
      grad_bias = add(grad_bias, jnp.sum(change, axis=(1, 3)), j)
    change, weights = change.astype(rows.dtype), weights.astype(v.dtype)
    grad_q += _product('bgsm,bgsk->bgmk', change, keys)
    grad_k = add(grad_k, _product('bgsm,bgmk->bgsk', change, rows), j)
    grad_v = add(grad_v, _product('bgsm,bgmv->bgsv', weights, back), j)
    return grad_q, (grad_k, grad_v, grad_bias)

  whole, touched = plan.visits.whole[own, i], plan.visits.touched[own, i]
  carry = jnp.zeros(rows.shape, jnp.float32), carry
  carry = lax.fori_loop(0, whole, functools.partial(visit, False), carry)
  grad_q, carry = lax.fori_loop(whole, touched, functools.partial(visit, True), carry)
  return carry, grad_q
