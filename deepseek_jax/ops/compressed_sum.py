"""The sum of one vector a replica, sent in few bits: there in pieces, back as a whole.

Every replica cuts its vector into as many pieces as there are replicas, rounds them and sends the
p-th to replica p (all-to-all). That one adds up in float32 what arrives, rounds the sum and sends
it to all (all-gather): as a reduce-scatter and an all-gather, with numbers that are small on the
way and never added up while they are. What rounding took away is told, so that it can be sent
another time. All functions here with an `axis` run inside `jax.shard_map`.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.formats import int4, int8

FORMATS = {8: int8, 4: int4}
"""Number formats by the bits of an element; each has a scale of 4 bytes a block."""
SCALE_BYTES = 4


def message_bytes(elements: int, bits: int, block: int) -> int:
  """Returns the bytes of `elements` numbers, a multiple of `block`, with their scales."""
  return elements * bits // 8 + elements // block * SCALE_BYTES


def pack(x: jax.Array, bits: int, block: int) -> jax.Array:
  """Rounds float32 [..., n] to a message [..., bytes] uint8: all values, then all scales.

  Args:
    x: `block` divides n.
    bits: of an element; of `FORMATS`.
    block: neighbours that share a scale.
  """
  encoded = FORMATS[bits].encode(x, block)
  parts = (jax.lax.bitcast_convert_type(part, jnp.uint8) for part in encoded)
  return jnp.concatenate([part.reshape(*x.shape[:-1], -1) for part in parts], axis=-1)


def unpack(message: jax.Array, bits: int, block: int) -> jax.Array:
  """Returns the numbers [..., n] float32 of a message [..., bytes]."""
  lead, size = message.shape[:-1], message.shape[-1]
  values = size // message_bytes(block, bits, block) * block * bits // 8
  raw = message[..., values:].reshape(*lead, -1, SCALE_BYTES)
  scales = jax.lax.bitcast_convert_type(raw, jnp.float32)
  if bits == 8:
    whole = jax.lax.bitcast_convert_type(message[..., :values], jnp.int8)
    return int8.decode(int8.Int8Blocks(whole, scales), block)
  return int4.decode(int4.Int4Blocks(message[..., :values], scales), block)


def compressed_sum(x: jax.Array, axis: str, bits: int, block: int) -> tuple[jax.Array, jax.Array]:
  """Returns the sum over replicas, the same to the last bit on all, and what rounding took away.

  The sum over replicas of x less that of the errors is the result: added to what is sent next time,
  nothing is ever lost.

  Args:
    x: [P, m] float32 of one of P replicas; `block` divides m.
    axis: the mesh axis of the replicas.
    bits: of an element on the way.
    block: neighbours that share a scale.

  Returns:
    The sum [P, m] and this replica's error [P, m]: of every piece what was lost on the way there,
    and of the piece that it added up what was lost on the way back.

  Source: 1-bit Adam, arXiv 2102.02888, section 3.3 (both ways compressed); DoubleSqueeze, arXiv
    1905.05957, algorithm 1 (errors of both ways kept).
  """
  with jax.named_scope('round'):
    sent = pack(x, bits, block)
    error = x - unpack(sent, bits, block)
  with jax.named_scope('there'):
    arrived = jax.lax.all_to_all(sent, axis, 0, 0)
  with jax.named_scope('add_up'):
    piece = jnp.sum(unpack(arrived, bits, block), axis=0)
    reply = pack(piece, bits, block)
    late = piece - unpack(reply, bits, block)
  with jax.named_scope('back'):
    every = jax.lax.all_gather(reply, axis)
  return unpack(every, bits, block), error.at[jax.lax.axis_index(axis)].add(late)
