"""Attention to chosen keys as a loop of the compiler's own: what every platform can run.

A step of the loop gathers the keys of a few queries, attends and forgets them; the gradient gathers
them again, and adds what each query says of a key to that key's row.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.attention.blocks import Back, Extras
from deepseek_jax.ops.attention.pieces import joined
from deepseek_jax.ops.attention.reference import MASKED, Seen, visible


class Form(NamedTuple):
  """What is static about a call of attention to chosen keys.

  Attributes:
    scale: factor on the scores.
    key: channels of a row that are the key; they come first.
    value: (first channel, channels) of a row that are the value.
    block: queries Q that share their keys.
    sets: blocks of queries that one step of the loop serves.
    mass: whether the weights of each key, summed over heads, are returned too.
  """

  scale: float
  key: int
  value: tuple[int, int]
  block: int
  sets: int
  mass: bool


def forward(
  form: Form,
  query: jax.Array,
  rows: jax.Array,
  extras: Extras,
  indices: jax.Array,
  seen: Seen | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Attends from whole steps of queries.

  Args:
    form: what is static.
    query: [B, T, H, K]; T is steps · `form.sets` · `form.block`.
    rows: [B, G, S, W] keys and values of each group of heads.
    extras: what joins the scores.
    indices: [B, N, m] int32 keys of each block of queries; -1 is none.
    seen: which of its block's keys a query may see; None where it may see all.

  Returns:
    Outputs [B, T, H, V] in the dtype of the rows; the logarithm of each softmax's sum [B, T, H]
    float32, 0 where there is no key; and weights summed over heads, [B, T, m] float32, or None.
  """
  key_bias, sinks = extras

  def step(number):
    with jax.named_scope('gather'):
      part = _part(form, number, query, rows, key_bias, indices, seen)
    with jax.named_scope('attend'):
      scores = _scores(form, part)
      top = jnp.max(scores, axis=-1, keepdims=True)
      if sinks is not None:
        top = jnp.maximum(top, _per_row(sinks, part))
      weights = jnp.where(part.mask, jnp.exp(scores - top), 0.0)
      total = jnp.sum(weights, axis=-1, keepdims=True)
      if sinks is not None:
        total += jnp.exp(_per_row(sinks, part) - top)
      whole = jnp.where(total > 0, total, 1.0)
      first, size = form.value
      values = part.rows if first == 0 else part.rows[..., first:]
      flat = weights.reshape(part.flat).astype(values.dtype)
      mixed = _product('bngxm,bngmv->bngxv', flat, values)[..., :size]
      out = mixed.reshape(*part.query.shape[:-1], size) / whole
      log_sum = jnp.where(total > 0, top + jnp.log(whole), 0.0)
    mass = jnp.sum(weights / whole, axis=(1, 4)) if form.mass else None
    return _tokens(out).astype(rows.dtype), _tokens(log_sum)[..., 0], mass

  steps = indices.shape[1] // form.sets
  out, log_sum, mass = lax.map(step, jnp.arange(steps))
  out, log_sum = joined(out), joined(log_sum)
  # [steps, B, g, Q, m] -> [B, T, m]
  mass = joined(mass.reshape(*mass.shape[:2], -1, mass.shape[-1])) if form.mass else None
  return out, log_sum, mass


def backward(
  form: Form,
  query: jax.Array,
  rows: jax.Array,
  key_bias: jax.Array | None,
  indices: jax.Array,
  seen: Seen | None,
  back: Back,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Makes the weights again from the logarithms of their sums.

  Args:
    form: what is static.
    query: [B, T, H, K], and so on as `forward` has them.
    rows: [B, G, S, W].
    key_bias: [B, S] float32, or None.
    indices: [B, N, m] int32.
    seen: which of its block's keys a query may see.
    back: what it starts from.

  Returns:
    Gradients of queries and rows, in their dtypes, and of the bias where there is one.
  """
  log_sum, drift, grad = back
  first, size = form.value
  width = rows.shape[-1]

  def step(sums, number):
    part = _part(form, number, query, rows, key_bias, indices, seen)
    pieces = (_piece(x, number, form.block * form.sets) for x in (grad, log_sum, drift))
    g, log, fall = (_grouped(form, x, rows.shape[1]) for x in pieces)
    weights = jnp.where(part.mask, jnp.exp(_scores(form, part) - log[..., None]), 0.0)
    # The gradient is as wide as a row where the value begins it: no copy of the rows is cut.
    wide = jnp.pad(g, [(0, 0)] * 5 + [(0, width - size)]) if first == 0 else g
    wide = wide.reshape(*part.flat[:-1], -1)
    values = part.rows if first == 0 else part.rows[..., first:]
    back = _product('bngxv,bngmv->bngxm', wide, values).reshape(part.mask_shape)
    grad_scores = weights * (back - fall[..., None])
    flat = (grad_scores * form.scale).reshape(part.flat).astype(rows.dtype)
    keys = part.rows if first == 0 else part.rows[..., : form.key]
    grad_query = _product('bngxm,bngmk->bngxk', flat, keys).reshape(part.query.shape)
    to_key = _product('bngxm,bngxk->bngmk', flat, part.query.reshape(*part.flat[:-1], -1))
    to_value = _product('bngxm,bngxv->bngmv', weights.reshape(part.flat).astype(g.dtype), wide)
    to_rows = to_key + to_value if first == 0 else jnp.concatenate([to_key, to_value], axis=-1)
    grad_rows, grad_bias = sums
    grad_rows = jax.vmap(lambda x, i, y: x.at[i].add(y))(
      grad_rows, part.indices, jnp.moveaxis(to_rows, 1, 3)
    )
    if key_bias is not None:
      to_bias = jnp.sum(grad_scores, axis=(1, 3, 4))
      grad_bias = jax.vmap(lambda x, i, y: x.at[i].add(y))(grad_bias, part.indices, to_bias)
    return (grad_rows, grad_bias), _tokens(grad_query).astype(query.dtype)

  batch, groups, slots, _ = rows.shape
  zeros = jnp.zeros((batch, slots, groups, width), jnp.float32)
  none = None if key_bias is None else jnp.zeros(key_bias.shape, jnp.float32)
  steps = jnp.arange(indices.shape[1] // form.sets)
  (grad_rows, grad_bias), grad_query = lax.scan(step, (zeros, none), steps)
  return joined(grad_query), jnp.swapaxes(grad_rows, 1, 2).astype(rows.dtype), grad_bias


class _Part(NamedTuple):
  """What one step works on: g sets of m keys, each shared by Q queries of G groups of R heads.

  Attributes:
    query: [B, G, g, Q, R, K].
    rows: [B, G, g, m, W].
    bias: [B, 1, g, 1, 1, m], or None.
    mask: [B, 1, g, Q, 1, m] bool.
    indices: [B, g, m] int32, 0 where there is none.
  """

  query: jax.Array
  rows: jax.Array
  bias: jax.Array | None
  mask: jax.Array
  indices: jax.Array

  @property
  def mask_shape(self) -> tuple[int, ...]:
    """[B, G, g, Q, R, m]."""
    return (*self.query.shape[:-1], self.rows.shape[3])

  @property
  def flat(self) -> tuple[int, ...]:
    """[B, G, g, Q · R, m]: the queries of a set are rows of one matrix."""
    batch, groups, sets, queries, heads, _ = self.query.shape
    return (batch, groups, sets, queries * heads, self.rows.shape[3])


def _part(form, number, query, rows, key_bias, indices, seen) -> _Part:
  found = _piece(indices, number, form.sets)
  safe = jnp.maximum(found, 0)
  picked = jax.vmap(lambda x, i: jnp.take(x, i, axis=1, mode='clip'))(rows, safe)
  q = _grouped(form, _piece(query, number, form.block * form.sets), rows.shape[1])
  mask = (found >= 0)[:, :, None, :]
  if seen is not None:
    mask &= _seen_part(form, number, seen, safe)
  bias = None
  if key_bias is not None:
    bias = jax.vmap(lambda x, i: x[i])(key_bias, safe)[:, None, :, None, None, :]
  return _Part(q, picked, bias, mask[:, None, :, :, None, :], safe)


def _seen_part(form, number, seen: Seen, safe: jax.Array) -> jax.Array:
  """Who of a step's queries sees whom of their keys, [B, g, Q, m] bool."""
  batch, sets, keys = safe.shape

  def of_queries(x):
    part = _piece(x, number, form.block * form.sets)
    return part.reshape(batch * sets, form.block)

  def of_keys(x):
    return jax.vmap(lambda x, i: x[i])(x, safe).reshape(batch * sets, keys)

  return visible(*seen.map(of_queries, of_keys)).reshape(batch, sets, form.block, keys)


def _scores(form: Form, part: _Part) -> jax.Array:
  """Masked scores [B, G, g, Q, R, m] float32."""
  keys = part.rows if form.value[0] == 0 else part.rows[..., : form.key]
  query = part.query.reshape(*part.flat[:-1], -1)
  scores = _product('bngxk,bngmk->bngxm', query, keys).reshape(part.mask_shape) * form.scale
  if part.bias is not None:
    scores += part.bias
  return jnp.where(part.mask, scores, MASKED)


def _per_row(sinks: jax.Array, part: _Part) -> jax.Array:
  """Spreads [H] to [1, G, 1, 1, R, 1]."""
  groups, heads = part.query.shape[1], part.query.shape[4]
  return sinks.astype(jnp.float32).reshape(1, groups, 1, 1, heads, 1)


def _grouped(form: Form, x: jax.Array, groups: int) -> jax.Array:
  """[B, g · Q, H, …] -> [B, G, g, Q, R, …]."""
  batch, _, heads = x.shape[:3]
  x = x.reshape(batch, form.sets, form.block, groups, heads // groups, *x.shape[3:])
  return jnp.moveaxis(x, 3, 1)


def _tokens(x: jax.Array) -> jax.Array:
  """[B, G, g, Q, R, …] -> [B, g · Q, H, …]: the inverse of `_grouped`."""
  x = jnp.moveaxis(x, 1, 3)
  batch, sets, block, groups, heads = x.shape[:5]
  return x.reshape(batch, sets * block, groups * heads, *x.shape[5:])


def _piece(x: jax.Array, number: Any, size: int) -> jax.Array:
  """Takes piece `number` of `size` along axis 1."""
  return lax.dynamic_slice_in_dim(x, number * size, size, axis=1)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
