"""Dense softmax attention: exact, and nothing of the size of all pairs is kept for the gradient."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.attention import long_rows, short_rows
from deepseek_jax.ops.attention.blocks import Back, Extras, Static, Window
from deepseek_jax.ops.attention.reference import Seen
from deepseek_jax.ops.kernels import attention_tpu

SHORT = 256
"""Keys up to which a block of queries holds its scores of all keys. On two CPU cores a running
softmax takes twice as long for 128 and 256 keys, gradient counted, as long for 512, and 0.7 times
as long for 1,024 (`scripts/bench_attention.py --what=short`)."""


NONE = Extras()


def attend_blocked(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  seen: Seen,
  *,
  scale: float,
  extras: Extras = NONE,
  window: Window | None = None,
  in_order: bool = False,
) -> jax.Array:
  """`reference.attend_seen`, in O(T + S) memory, forward and backward.

  Blocks of keys that no query of a block can see are not visited: their number follows from the
  positions and segments when the program runs. So a window costs what it shows. Long rows take
  Pallas kernels on a TPU where these fit; where the compiler is left to partition the arrays, which
  it cannot do to a kernel, and on a GPU they take loops of the compiler's own.

  Args:
    query: [B, T, H, K].
    key: [B, S, G, K]; G divides H.
    value: [B, S, G, V].
    seen: which key each query may see.
    scale: factor on the scores.
    extras: bias of each key and sink of each head, where there are any.
    window: (size, n): see `reference.attend_seen`.
    in_order: promises that key s is the token of query s and that no query sees a later one; fewer
      blocks are then visited. Of queries that break the promise (padding, whose positions are all
      0) the results are finite and of no use.

  Returns:
    [B, T, H, V] in the dtype of `value`; scores, softmax and sums are float32.

  Source: Dao et al., arXiv 2205.14135, section 3.1; the running softmax: Milakov and Gimelshein,
    arXiv 1805.02867, algorithm 3.
  """
  with jax.named_scope('attend'):
    static = Static(scale, window, in_order)
    return _attend(query, key, value, extras, seen, static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(query, key, value, extras: Extras, seen: Seen, static: Static):
  return _forward(query, key, value, extras, seen, static)[0]


def _forward(query, key, value, extras, seen, static):
  arrays = query, key, value, extras, seen
  out, log_sum = forward_part(*arrays, static)
  return out, (*arrays, out, log_sum)


def forward_part(
  query: jax.Array, key: jax.Array, value: jax.Array, extras: Extras, seen: Seen, static: Static
) -> tuple[jax.Array, jax.Array]:
  """Attends to some keys [B, S, G, K]; see `long_rows.forward`, of which it takes the best form."""
  if key.shape[1] <= SHORT:
    return short_rows.forward(query, key, value, extras, seen, static)
  forms = {'default': functools.partial(long_rows.forward, static=static)}
  if attention_tpu.fits(query, key, value, extras, static):
    forms['tpu'] = functools.partial(attention_tpu.forward, static=static)
  return lax.platform_dependent(query, key, value, extras, seen, **forms)


def _backward(static, saved, grad):
  query, key, value, extras, seen, out, log_sum = saved
  drift = softmax_drift(out, grad)
  back = Back(log_sum, drift, grad)
  *grads, bias = backward_part(query, key, value, extras, seen, static, back)
  sinks = None
  if extras.sinks is not None:
    sinks = -jnp.sum(jnp.exp(extras.sinks - log_sum) * drift, axis=(0, 1))
    sinks = sinks.astype(extras.sinks.dtype)
  if bias is not None:
    bias = bias.astype(extras.key_bias.dtype)
  return *grads, Extras(bias, sinks), None


def softmax_drift(out: jax.Array, grad: jax.Array) -> jax.Array:
  """Returns `Back.drift` [B, T, H] of outputs and their gradient, [B, T, H, V] both."""
  return jnp.sum(out.astype(jnp.float32) * grad.astype(jnp.float32), axis=-1)


def backward_part(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  extras: Extras,
  seen: Seen,
  static: Static,
  back: Back,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
  """Returns what some keys give to the gradients; see `long_rows.backward`.

  Args:
    query: [B, T, H, K].
    key: [B, S, G, K] all keys, or a part of them.
    value: [B, S, G, V].
    extras: what joins the scores.
    seen: who sees whom.
    static: what is known when it is compiled.
    back: what it starts from; its sums are over all keys, also where these are a part of them.
  """

  def form(module, query, key, value, extras, seen, back):
    return module.backward(query, key, value, extras, seen, static, back)

  arrays = query, key, value, extras, seen, back
  if key.shape[1] <= SHORT:
    return form(short_rows, *arrays)
  forms = {'default': functools.partial(form, long_rows)}
  if attention_tpu.fits(query, key, value, extras, static):
    forms['tpu'] = functools.partial(form, attention_tpu)
  return lax.platform_dependent(*arrays, **forms)


_attend.defvjp(_forward, _backward)
