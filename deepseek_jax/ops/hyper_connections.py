"""Manifold-constrained hyper-connections: the weights that mix the lanes of a residual stream.

Legend beside the usual one: R lanes, M = R · (R + 2) mixing weights of a site, in the order read,
write, carry (row by row).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mixes(NamedTuple):
  """How one sublayer reads the lanes and writes to them, all float32.

  Attributes:
    read: [B, T, R] weight of each lane in the sublayer's input, in (ε, 1 + ε).
    write: [B, T, R] weight of the sublayer's output in each lane, in (0, 2).
    carry: [B, T, R, R] weight of lane i (third axis) in the new lane j (fourth axis). Rows and
      columns sum to 1.
  """

  read: jax.Array
  write: jax.Array
  carry: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lane_logits(stream: jax.Array, matrix: jax.Array, epsilon: float) -> jax.Array:
  """Maps the lanes of each token, normalised together, to some numbers.

  Args:
    stream: [B, T, R, D].
    matrix: [R · D, M] float32.
    epsilon: added to the mean square.

  Returns:
    [B, T, M] float32. The norm has no scale, and divides the product rather than the stream, so
    that no normalised stream is ever stored. float32: the numbers are exponents.

  Source: DeepSeek-V4, arXiv 2606.19348, section 2.2.
  """
  return _lane_logits_forward(stream, matrix, epsilon)[0]


def _lane_logits_forward(stream, matrix, epsilon):
  lanes = _flat(stream)
  mean_square = jnp.einsum('nk,nk->n', lanes, lanes) / lanes.shape[1]
  inverse = jax.lax.rsqrt(mean_square + epsilon)
  product = jnp.einsum('nk,mk->nm', lanes, matrix.astype(jnp.float32).T)
  logits = (product * inverse[:, None]).reshape(*stream.shape[:2], -1)
  return logits, (stream, matrix, inverse, logits)


def _lane_logits_backward(epsilon, saved, gradient):
  del epsilon
  stream, matrix, inverse, logits = saved
  lanes, grads = _flat(stream), gradient.reshape(-1, gradient.shape[-1])
  along = jnp.sum(grads * logits.reshape(grads.shape), axis=1) * inverse**2 / lanes.shape[1]
  grads *= inverse[:, None]
  grad_lanes = jnp.einsum('nm,mk->nk', grads, matrix.astype(jnp.float32).T)
  grad_lanes -= along[:, None] * lanes
  # [M, R · D] first, then turned, and the compiler kept from joining the two: it would transpose
  # the whole stream.
  grad_matrix = jax.lax.optimization_barrier(jnp.einsum('nm,nk->mk', grads, lanes)).T
  return grad_lanes.reshape(stream.shape).astype(stream.dtype), grad_matrix.astype(matrix.dtype)


lane_logits.defvjp(_lane_logits_forward, _lane_logits_backward)


def _flat(stream: jax.Array) -> jax.Array:
  """[B, T, R, D] -> [B · T, R · D] float32."""
  return stream.astype(jnp.float32).reshape(-1, stream.shape[2] * stream.shape[3])


def site_mixes(
  logits: jax.Array, base: jax.Array, gates: jax.Array, iterations: int, epsilon: float
) -> Mixes:
  """Turns the numbers of a site into mixing weights.

  Args:
    logits: [B, T, M] float32 from `lane_logits`.
    base: [M] float32, the part that no token changes.
    gates: [3] float32, factors on the logits of read, write and carry.
    iterations: Sinkhorn iterations; the first begins with a softmax.
    epsilon: floor of the reading weights, and of Sinkhorn's divisors.

  Source: DeepSeek-V4, arXiv 2606.19348, section 2.2; mHC, arXiv 2512.24880, section 4.2.
  """
  lanes = round((logits.shape[-1] + 1) ** 0.5) - 1
  read, write, carry = (
    part * gate + bias
    for part, gate, bias in zip(
      jnp.split(logits, (lanes, 2 * lanes), axis=-1),
      gates,
      jnp.split(base, (lanes, 2 * lanes)),
      strict=True,
    )
  )
  square = carry.reshape(*carry.shape[:-1], lanes, lanes)
  return Mixes(
    read=jax.nn.sigmoid(read) + epsilon,
    write=2 * jax.nn.sigmoid(write),
    carry=sinkhorn(square, iterations, epsilon),
  )


def head_mix(logits: jax.Array, base: jax.Array, gate: jax.Array, epsilon: float) -> jax.Array:
  """Returns the weight [B, T, R] of each lane at the end of the stack, from logits [B, T, R]."""
  return jax.nn.sigmoid(logits * gate + base) + epsilon


def sinkhorn(logits: jax.Array, iterations: int, epsilon: float) -> jax.Array:
  """Makes matrices whose rows and columns sum to 1 out of matrices of any numbers.

  A softmax over every row, then columns are divided by their sums; then rows and columns by turns.
  The gradient goes the same way back: each division is undone from the divisor, [.., R] numbers,
  so that no matrix but the last is kept.

  Args:
    logits: [..., R, R] float32; rows are the next to last axis.
    iterations: divisions of the columns, 1 or more.
    epsilon: added to the softmax and to every divisor.

  Returns:
    [..., R, R] float32. Columns sum to 1 within ε; rows as far as the iterations have converged.

  Source: Sinkhorn & Knopp 1967; DeepSeek-V4, arXiv 2606.19348, section 2.2.
  """
  # Tokens last: sums over 4 neighbours would use a quarter of a vector register or less.
  tokens_last = jnp.moveaxis(logits, (-2, -1), (0, 1))
  return jnp.moveaxis(_sinkhorn(tokens_last, iterations, epsilon), (0, 1), (-2, -1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _sinkhorn(logits: jax.Array, iterations: int, epsilon: float) -> jax.Array:
  return _sinkhorn_forward(logits, iterations, epsilon)[0]


def _divide(matrix: jax.Array, axis: int, epsilon: float) -> tuple[jax.Array, jax.Array]:
  divisor = jnp.sum(matrix, axis=axis, keepdims=True) + epsilon
  return matrix / divisor, divisor


def _undivide(result, gradient, divisor, axis: int) -> tuple[jax.Array, jax.Array]:
  """Returns what was divided, and its gradient."""
  drift = jnp.sum(gradient * result, axis=axis, keepdims=True)
  return result * divisor, (gradient - drift) / divisor


def _sinkhorn_forward(logits, iterations, epsilon):
  soft = jax.nn.softmax(logits, axis=1)
  matrix, first = _divide(soft + epsilon, 0, epsilon)

  def iterate(matrix, _):
    matrix, rows = _divide(matrix, 1, epsilon)
    matrix, columns = _divide(matrix, 0, epsilon)
    return matrix, (rows, columns)

  matrix, divisors = jax.lax.scan(iterate, matrix, length=iterations - 1)
  return matrix, (soft, matrix, first, divisors)


def _sinkhorn_backward(iterations, epsilon, saved, gradient):
  del iterations, epsilon
  soft, matrix, first, divisors = saved

  def undo(pair, divisors):
    (matrix, gradient), (rows, columns) = pair, divisors
    matrix, gradient = _undivide(matrix, gradient, columns, 0)
    return _undivide(matrix, gradient, rows, 1), None

  (matrix, gradient), _ = jax.lax.scan(undo, (matrix, gradient), divisors, reverse=True)
  _, gradient = _undivide(matrix, gradient, first, 0)
  return (soft * (gradient - jnp.sum(gradient * soft, axis=1, keepdims=True)),)


_sinkhorn.defvjp(_sinkhorn_forward, _sinkhorn_backward)


@jax.custom_vjp
def collapse(stream: jax.Array, read: jax.Array) -> jax.Array:
  """Adds up the lanes of a stream, weighted.

  Args:
    stream: [B, T, R, D].
    read: [B, T, R] float32.

  Returns:
    [B, T, D] in the dtype of `stream`; the sum is float32.
  """
  total = sum(
    read[:, :, lane, None] * stream[:, :, lane].astype(jnp.float32)
    for lane in range(stream.shape[2])
  )
  return jnp.asarray(total).astype(stream.dtype)


def _collapse_forward(stream, read):
  return collapse(stream, read), (stream, read)


def _collapse_backward(saved, gradient):
  stream, read = saved
  # Sums over channels are products: the compiler adds up a reduction one number at a time.
  grad_read = jnp.einsum('btrd,btd->btr', stream, gradient, preferred_element_type=jnp.float32)
  grad_stream = read[..., None] * gradient[:, :, None].astype(jnp.float32)
  return grad_stream.astype(stream.dtype), grad_read


collapse.defvjp(_collapse_forward, _collapse_backward)


@jax.custom_vjp
def spread(stream: jax.Array, output: jax.Array, write: jax.Array, carry: jax.Array) -> jax.Array:
  """Mixes the lanes of a stream and adds a sublayer's output to each.

  Args:
    stream: [B, T, R, D] that the sublayer read.
    output: [B, T, D] of the sublayer.
    write: [B, T, R] float32.
    carry: [B, T, R, R] float32, from lane (third axis) to lane (fourth axis).

  Returns:
    [B, T, R, D] in the dtype of `stream`; sums are float32.

  Source: DeepSeek-V4, arXiv 2606.19348, section 2.2.
  """
  return _mix_lanes(stream, carry, output, write)


def _mix_lanes(stream, carry, output=None, write=None):
  """One pass over the stream: a lane is read once for all lanes it goes to."""
  parts = [
    carry[:, :, lane, :, None] * stream[:, :, lane, None].astype(jnp.float32)
    for lane in range(stream.shape[2])
  ]
  if output is not None:
    parts.append(write[..., None] * output[:, :, None].astype(jnp.float32))
  return jnp.asarray(sum(parts)).astype(stream.dtype)


def _spread_forward(stream, output, write, carry):
  return _mix_lanes(stream, carry, output, write), (stream, output, write, carry)


def _spread_backward(saved, gradient):
  stream, output, write, carry = saved
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  grad_stream = _mix_lanes(gradient, jnp.swapaxes(carry, 2, 3)).astype(stream.dtype)
  return (
    grad_stream,
    collapse(gradient, write).astype(output.dtype),
    product('btd,btjd->btj', output, gradient),
    product('btid,btjd->btij', stream, gradient),
  )


spread.defvjp(_spread_forward, _spread_backward)
