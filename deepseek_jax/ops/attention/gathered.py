"""Attention to chosen keys alone: time and memory grow with how many are chosen, both ways.

Two forms of one loop. In `attend_selected` every query has keys of its own; in `attend_blocks` a
block of neighbouring queries shares them, so that one gather serves many queries and products are
large. A step of the loop gathers the keys of a few queries, attends and forgets them; the gradient
gathers them again, and adds what each query says of a key to that key's row.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.attention.pieces import joined, padded
from deepseek_jax.ops.attention.reference import MASKED, Seen, visible

ROWS = 4096
"""Keys that one step of the loop gathers: the copies stay in a processor's cache."""


class Form(NamedTuple):
  """What is static about a call.

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


class Selected(NamedTuple):
  """What attention to chosen keys returns.

  Attributes:
    out: [B, T, H, V].
    mass: [B, T, m] float32 softmax weights of the chosen keys, summed over heads; no gradient
      flows through it. None where it was not asked for.
  """

  out: jax.Array
  mass: jax.Array | None


class KeySets(NamedTuple):
  """Keys that blocks of queries share.

  Attributes:
    indices: [B, N, m] int32 keys of queries n · block to (n + 1) · block - 1, no key twice in a
      row; -1 is none. N = ⌈T / block⌉.
    block: queries of a block; the last may have fewer.
    seen: which of its block's keys a query may see; None where it may see all.
  """

  indices: jax.Array
  block: int = 1
  seen: Seen | None = None


def attend_selected(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array | int,
  indices: jax.Array,
  *,
  scale: float,
  key_bias: jax.Array | None = None,
  sinks: jax.Array | None = None,
  mass: bool = False,
) -> Selected:
  """Softmax attention of every query to keys of its own choice.

  Args:
    query: [B, T, H, K].
    key: [B, S, K], one for all heads, or [B, S, G, K] for G groups of heads.
    value: [B, S, V] or [B, S, G, V] like the key; or V, where the first V channels of the key are
      its value, as in absorbed latent attention: they are then gathered once.
    indices: [B, T, k] int32, no key twice in a row; -1 is none.
    scale: factor on the scores.
    key_bias: [B, S] float32 added to every score of a key, or None.
    sinks: [H] float32 logit of each head that takes part in the softmax without a value, or None.
    mass: whether to return the weights of the chosen keys.

  Returns:
    `out` [B, T, H, V] in the dtype of the value; zero for a query without keys. Scores and softmax
    are float32.

  Source: DeepSeek-V3.2, section on DeepSeek Sparse Attention.
  """
  count = max(min(ROWS // max(indices.shape[2], 1), indices.shape[1]), 1)
  return _attend(query, key, value, KeySets(indices), key_bias, sinks, (scale, count, mass))


def attend_blocks(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array | int,
  sets: KeySets,
  *,
  scale: float,
  key_bias: jax.Array | None = None,
  sinks: jax.Array | None = None,
  mass: bool = False,
) -> Selected:
  """Softmax attention of blocks of queries to keys that the queries of a block share.

  Args:
    query: [B, T, H, K].
    key: [B, S, K] or [B, S, G, K].
    value: like the key, or V; see `attend_selected`.
    sets: the keys of each block.
    scale: factor on the scores.
    key_bias: [B, S] float32 added to every score of a key, or None.
    sinks: [H] float32 logit of each head without a value, or None.
    mass: whether to return the weights of the chosen keys.

  Returns:
    `out` [B, T, H, V] in the dtype of the value; zero for a query that sees no key.

  Source: keys shared by a block, products of blocks: Yuan et al. (NSA), arXiv 2502.11089,
    section 3.4.
  """
  return _attend(query, key, value, sets, key_bias, sinks, (scale, 1, mass))


def _attend(query, key, value, key_sets, key_bias, sinks, options):
  indices, block, seen = key_sets
  scale, sets, mass = options
  if key.ndim == 3:
    key = key[:, :, None]
  if isinstance(value, int):
    rows, span = key, (0, value)
  else:
    value = value[:, :, None] if value.ndim == 3 else value
    rows = jnp.concatenate([key, value.astype(key.dtype)], axis=-1)
    span = (key.shape[-1], value.shape[-1])
  form = Form(scale, key.shape[-1], span, block, sets, mass)
  length = query.shape[1]
  # Whole steps of the loop: what is added has no keys, and is cut off again.
  steps = -(-length // (block * sets))
  query = padded(query, steps * block * sets)
  indices = padded(indices, steps * sets, -1)
  if seen is not None:
    # A query at position -1 sees nothing.
    seen = seen.map(lambda x: padded(x, steps * block * sets, -1), lambda x: x)
  # Heads first: the keys of a group lie together, as its products read them.
  rows = jnp.swapaxes(rows, 1, 2)
  out, weights = _selected(form, query, rows, key_bias, sinks, indices, seen)
  return Selected(out[:, :length], weights[:, :length] if mass else None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _selected(form, query, rows, key_bias, sinks, indices, seen):
  return _forward(form, query, rows, key_bias, sinks, indices, seen)[0]


def _forward(form, query, rows, key_bias, sinks, indices, seen):
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
    mass = jnp.sum(weights / whole, axis=(1, 4)) if form.mass else jnp.zeros(())
    return _tokens(out).astype(rows.dtype), _tokens(log_sum)[..., 0], mass

  steps = indices.shape[1] // form.sets
  out, log_sum, mass = lax.map(step, jnp.arange(steps))
  out, log_sum = joined(out), joined(log_sum)
  # [steps, B, g, Q, m] -> [B, T, m]
  mass = joined(mass.reshape(*mass.shape[:2], -1, mass.shape[-1])) if form.mass else mass
  return (out, mass), (query, rows, key_bias, sinks, indices, seen, out, log_sum)


def _backward(form, saved, grads):
  query, rows, key_bias, sinks, indices, seen, out, log_sum = saved
  grad = grads[0]
  # Σ_s weight_s · ∂loss/∂weight_s of every query and head: what the softmax subtracts.
  drift = jnp.sum(out.astype(jnp.float32) * grad.astype(jnp.float32), axis=-1)
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
  grad_sinks = None
  if sinks is not None:
    grad_sinks = -jnp.sum(jnp.exp(sinks - log_sum) * drift, axis=(0, 1))
  grad_rows = jnp.swapaxes(grad_rows, 1, 2).astype(rows.dtype)
  return joined(grad_query), grad_rows, grad_bias, grad_sinks, None, None


_selected.defvjp(_forward, _backward)


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
