"""Losses over a large vocabulary without ever holding all logits."""

import functools

import jax
import jax.numpy as jnp
import optax


def cross_entropy_reference(
  hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
  """Slow and obvious twin of `chunked_cross_entropy`: holds all logits [B, T, V] at once."""
  logits = jnp.einsum('btd,dv->btv', hidden, head, preferred_element_type=jnp.float32)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - picked) * weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked_cross_entropy(
  hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int = 128
) -> jax.Array:
  """Weighted sum of next-token cross-entropies, `chunk` positions of each row at a time.

  The gradient is made in the forward pass, while a chunk's logits exist: no chunk is computed
  twice, and at most [B, chunk, V] float32 logits are alive.

  Args:
    hidden: [B, T, D] final hidden states.
    head: [D, V] output matrix in the dtype of `hidden`.
    targets: [B, T] int32.
    weights: [B, T] float32; constants, they get no gradient.
    chunk: positions of each row taken together.

  Returns:
    Scalar float32, in nats: Σ weight · −log p(target). Logits are float32, since a
    log-probability is a small difference of large numbers.
  """
  return _loss_and_gradients(hidden, head, targets, weights, chunk, gradients=False)[0]


def chunked_choice(
  hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int = 128
) -> tuple[jax.Array, jax.Array]:
  """The loss of `chunked_cross_entropy`, and the likeliest tokens, from one pass over the logits.

  Args:
    hidden: [B, T, D] final hidden states.
    head: [D, V] output matrix in the dtype of `hidden`.
    targets: [B, T] int32.
    weights: [B, T] float32.
    chunk: positions of each row taken together.

  Returns:
    Scalar float32 in nats; and [B, T] int32, the first of equally likely ones.
  """

  def body(total, piece):
    h, target, weight = piece
    logits = jnp.einsum('btd,dv->btv', h, head, preferred_element_type=jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    return total + jnp.sum(loss * weight), jnp.argmax(logits, axis=-1).astype(jnp.int32)

  pieces = tuple(_split(x, chunk) for x in (hidden, targets, weights))
  total, chosen = jax.lax.scan(body, jnp.float32(0), pieces)
  batch, length, _ = hidden.shape
  return total, jnp.moveaxis(chosen, 0, 1).reshape(batch, -1)[:, :length]


def _split(x: jax.Array, chunk: int) -> jax.Array:
  """Cuts [B, T, …] into [chunks, B, chunk, …], zeros at the end."""
  batch, length = x.shape[:2]
  chunk = min(chunk, length)
  chunks = -(-length // chunk)
  x = jnp.pad(x, ((0, 0), (0, chunks * chunk - length)) + ((0, 0),) * (x.ndim - 2))
  return jnp.moveaxis(x.reshape(batch, chunks, chunk, *x.shape[2:]), 1, 0)


def _loss_and_gradients(hidden, head, targets, weights, chunk, gradients):
  batch, length, width = hidden.shape

  def body(carry, piece):
    total, grad_head = carry
    h, target, weight = piece
    logits = jnp.einsum('btd,dv->btv', h, head, preferred_element_type=jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exponents = jnp.exp(logits - top)
    mass = jnp.sum(exponents, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(logits, target[..., None], axis=-1)
    loss = (jnp.log(mass) + top - picked)[..., 0]
    total += jnp.sum(loss * weight)
    if not gradients:
      return (total, grad_head), None
    hit = jnp.arange(head.shape[1]) == target[..., None]
    grad_logits = ((exponents / mass - hit) * weight[..., None]).astype(h.dtype)
    grad_hidden = jnp.einsum('btv,dv->btd', grad_logits, head)
    grad_head += jnp.einsum('btd,btv->dv', h, grad_logits, preferred_element_type=jnp.float32)
    return (total, grad_head), grad_hidden

  start = (jnp.float32(0), jnp.zeros(head.shape if gradients else (), jnp.float32))
  (total, grad_head), grad_hidden = jax.lax.scan(
    body, start, tuple(_split(x, chunk) for x in (hidden, targets, weights))
  )
  if gradients:
    grad_hidden = jnp.moveaxis(grad_hidden, 0, 1).reshape(batch, -1, width)
    grad_hidden = grad_hidden[:, :length]
  return total, grad_hidden, grad_head


def _forward(hidden, head, targets, weights, chunk):
  total, grad_hidden, grad_head = _loss_and_gradients(
    hidden, head, targets, weights, chunk, gradients=True
  )
  return total, (grad_hidden, grad_head.astype(head.dtype))


def _backward(chunk, saved, grad):
  grad_hidden, grad_head = saved
  scale = lambda x: (x.astype(jnp.float32) * grad).astype(x.dtype)  # noqa: E731
  return scale(grad_hidden), scale(grad_head), None, None


chunked_cross_entropy.defvjp(_forward, _backward)
