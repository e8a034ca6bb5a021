"""What a token knows of the tokens before it, at the cost of one sum."""

import jax
import jax.numpy as jnp


def segment_sums(x: jax.Array, segments: jax.Array) -> jax.Array:
  """Sums every token's own packed document up to the token, itself included.

  Documents do not meet even in rounding: a sum begins anew where a document does, and is not the
  difference of two long ones.

  Args:
    x: [B, T, D] float32.
    segments: [B, T] int32 packed document of each token.

  Returns:
    [B, T, D] float32.
  """
  first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)

  def join(left, right):
    (left_sum, left_first), (right_sum, right_first) = left, right
    total = jnp.where(right_first, right_sum, left_sum + right_sum)
    return total, left_first | right_first

  return jax.lax.associative_scan(join, (x, first[:, :, None]), axis=1)[0]
