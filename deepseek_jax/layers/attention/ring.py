"""A ring of the last tokens of each row, from which the last few can be taken back.

The token at position p lies in slot p mod R. What is read are the tokens before the first one that
is fed, wherever that one stands: after a step back, feeding again writes over what was wrong. A
ring of `count` + `spare` slots still holds the last `count` tokens after up to `spare` steps back.
"""

import jax
import jax.numpy as jnp


def before(ring: jax.Array, positions: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """Returns the `count` tokens before the first of `positions`.

  Args:
    ring: [B, R, …], R at least `count`.
    positions: [B, T] int32 of the tokens that are fed, one after the other.
    count: how many.

  Returns:
    [B, count, …], the newest last, and their positions [B, count] int32; what has a negative one
    is meaningless.
  """
  places = positions[:, :1] + jnp.arange(-count, 0, dtype=jnp.int32)
  slots = places % max(ring.shape[1], 1)
  return jax.vmap(lambda x, i: x[i])(ring, slots), places


def write(ring: jax.Array, new: jax.Array, positions: jax.Array, real: jax.Array) -> jax.Array:
  """Puts tokens in their slots: of those fed at once, the last R.

  Args:
    ring: [B, R, …].
    new: [B, T, …].
    positions: [B, T] int32, one after the other.
    real: [B, T] bool; what is not real comes last and leaves no trace.
  """
  size = ring.shape[1]
  if not size:
    return ring
  last = jnp.max(jnp.where(real, positions, -1), axis=1, keepdims=True)
  slots = jnp.where(real & (positions > last - size), positions % size, size)
  rows = jnp.arange(ring.shape[0])[:, None]
  return ring.at[rows, slots].set(new.astype(ring.dtype), mode='drop')
