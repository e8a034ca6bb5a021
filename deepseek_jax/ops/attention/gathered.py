"""Attention to chosen keys alone: time and memory grow with how many are chosen, both ways.

Two forms. In `attend_selected` every query has keys of its own; in `attend_blocks` a block of
neighbouring queries shares them, so that one gather serves many queries and products are large.
A loop of the compiler's own runs both on any platform; on a TPU they take Pallas kernels where
these fit, which hold no copy of the keys outside of the chip.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.attention import gathered_loop
from deepseek_jax.ops.attention.blocks import Back, Extras
from deepseek_jax.ops.attention.gathered_loop import Form
from deepseek_jax.ops.attention.pieces import padded
from deepseek_jax.ops.attention.reference import Seen
from deepseek_jax.ops.kernels import gathered_tpu

ROWS = 4096
"""Keys that one step of the loop gathers: the copies stay in a processor's cache."""


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
  out, weights = _selected(form, query, rows, Extras(key_bias, sinks), indices, seen)
  return Selected(out[:, :length], weights[:, :length] if mass else None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _selected(form, query, rows, extras: Extras, indices, seen):
  return _forward(form, query, rows, extras, indices, seen)[0]


def _forward(form, *arrays):
  query, rows, _, indices, _ = arrays
  forms = {'default': functools.partial(gathered_loop.forward, form)}
  if gathered_tpu.fits(form, query, rows, indices):
    forms['tpu'] = functools.partial(gathered_tpu.forward, form)
  out, log_sum, mass = _on_platform(forms, *arrays)
  return (out, mass), (*arrays, out, log_sum)


def _backward(form, saved, grads):
  query, rows, (key_bias, sinks), indices, seen, out, log_sum = saved
  grad = grads[0]
  # Σ_s weight_s · ∂loss/∂weight_s of every query and head: what the softmax subtracts.
  drift = jnp.sum(out.astype(jnp.float32) * grad.astype(jnp.float32), axis=-1)
  forms = {'default': functools.partial(gathered_loop.backward, form)}
  if gathered_tpu.fits(form, query, rows, indices, backward=True):
    forms['tpu'] = functools.partial(gathered_tpu.backward, form)
  back = Back(log_sum, drift, grad)
  *grads, grad_bias = _on_platform(forms, query, rows, key_bias, indices, seen, back)
  grad_sinks = None
  if sinks is not None:
    grad_sinks = -jnp.sum(jnp.exp(sinks - log_sum) * drift, axis=(0, 1))
  return *grads, Extras(grad_bias, grad_sinks), None, None


_selected.defvjp(_forward, _backward)


def _on_platform(forms, *arrays):
  """Runs the form of the platform that the program is lowered for."""
  if len(forms) == 1:
    return forms['default'](*arrays)
  return lax.platform_dependent(*arrays, **forms)
