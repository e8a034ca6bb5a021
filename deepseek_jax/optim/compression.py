"""How the gradients of replicas are added up: as they are, or in few bits.

Replicas are slices joined by a slow network. Within one, gradients are summed where the compiler
puts it; what a device then holds of them crosses to the same device of the other replicas.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.ops.compressed_sum import FORMATS, compressed_sum, message_bytes
from deepseek_jax.optim.check import check_fields

Leaves = list[jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact:
  """Adds up float32 gradients.

  The same numbers as without it, but for the order of sums. What it says is where they cross: of
  weights that are sharded within a replica, each device exchanges its own shard alone.
  """

  @property
  def feedback(self) -> None:
    """Nothing is lost, and nothing has to be kept."""
    return None

  def sum_leaves(self, leaves: Leaves, axis: str) -> tuple[Leaves, Leaves]:
    """Returns the sums over replicas of a replica's arrays, and errors, which are zero."""
    return [jax.lax.psum(leaf, axis) for leaf in leaves], [jnp.zeros_like(leaf) for leaf in leaves]

  def sent_bytes(self, sizes: Sequence[int], replicas: int) -> int:
    """Returns the bytes that a device sends to sum arrays of these sizes in a ring."""
    return 2 * (replicas - 1) * 4 * sum(sizes) // replicas


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorFeedback:
  """What rounding took away is kept, and added to what is sent next time.

  The sum of all that was ever received is then that of all that was ever to be sent, less what is
  kept at the moment: rounding delays, and loses nothing.

  Attributes:
    decay: share of the error that is kept; below 1 it forgets what is old.

  Source: Karimireddy et al., arXiv 1901.09847, algorithm 2.
  """

  decay: float = 1.0

  def __post_init__(self):
    check_fields(self, {'decay': (0 < self.decay <= 1, 'a share in (0, 1]')})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantised:
  """Adds up gradients that travel as integers of few bits, one scale a block.

  An element is off by at most half a step on the way there from each replica, and once more on the
  way back; a step is the largest magnitude of its block over 127 (8 bits) or 7 (4 bits).

  Attributes:
    bits: of an element on the way, 8 or 4.
    block: neighbouring elements that share a scale of 4 bytes; even.
    feedback: what becomes of the errors; None forgets them.

  Source: 1-bit Adam, arXiv 2102.02888, section 3.3; ZeRO++, arXiv 2306.10209, section 3.3 (blocks,
    all-to-all).
  """

  bits: int = 8
  block: int = 128
  feedback: ErrorFeedback | None = ErrorFeedback()

  def __post_init__(self):
    check_fields(
      self,
      {
        'bits': (self.bits in FORMATS, f'one of {sorted(FORMATS)}'),
        'block': (self.block >= 2 and self.block % 2 == 0, 'an even count of at least 2'),
      },
    )

  def sum_leaves(self, leaves: Leaves, axis: str) -> tuple[Leaves, Leaves]:
    """Returns the sums over replicas of a replica's arrays, and what rounding took away here.

    The arrays, float32 of any shape, travel as one message. No block has elements of two of them.

    Args:
      leaves: of this replica; of the same shapes on all.
      axis: the mesh axis of the replicas; all axes are manual.
    """
    replicas = jax.lax.axis_size(axis)
    flat = [_pad(leaf.reshape(-1).astype(jnp.float32), self.block) for leaf in leaves]
    vector = _pad(jnp.concatenate(flat), replicas * self.block).reshape(replicas, -1)
    found = compressed_sum(vector, axis, self.bits, self.block)
    ends, result = [0], []
    for part in flat:
      ends.append(ends[-1] + part.size)
    for whole in found:
      parts = [whole.reshape(-1)[start : start + leaf.size] for start, leaf in zip(ends, leaves)]
      result.append([part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])
    return result[0], result[1]

  def sent_bytes(self, sizes: Sequence[int], replicas: int) -> int:
    """Returns the bytes that a device sends to sum arrays of these sizes as one message."""
    blocks = sum(-(-size // self.block) for size in sizes)
    piece = -(-blocks // replicas) * self.block
    return 2 * (replicas - 1) * message_bytes(piece, self.bits, self.block)


def _pad(x: jax.Array, multiple: int) -> jax.Array:
  """Lengthens [n] by zeros to a multiple."""
  return jnp.pad(x, (0, -x.size % multiple))


def buckets(addresses: Sequence[str]) -> dict[str, list[str]]:
  """Groups the arrays of a model by when the backward pass has them: part → its addresses.

  A message for each part, so that none waits for parts whose gradients come later. What the layers
  of one scan have comes at once, when the loop is over: `stack/segment_1` is one part.

  Args:
    addresses: of the parameters, such as 'stack/segment_0/block_0/attention/output'.
  """
  found: dict[str, list[str]] = {}
  for address in addresses:
    first, *rest = address.split('/')
    name = f'{first}/{rest[0]}' if first == 'stack' else first
    found.setdefault(name, []).append(address)
  return found


def sum_tree(kind: Exact | Quantised, tree: dict[str, jax.Array], axis: str) -> tuple[Any, Any]:
  """Sums the arrays of every replica, bucket by bucket; runs inside `jax.shard_map` of all axes.

  Args:
    kind: how.
    tree: address → array of this replica, as this device holds it.
    axis: the mesh axis of the replicas.

  Returns:
    Two dicts like `tree`: sums, the same on all replicas, and errors of this one.
  """
  totals: dict[str, jax.Array] = {}
  errors: dict[str, jax.Array] = {}
  for name, addresses in buckets(tuple(tree)).items():
    with jax.named_scope(f'exchange/{name}'):
      sums, lost = kind.sum_leaves([tree[address] for address in addresses], axis)
    totals |= dict(zip(addresses, sums, strict=True))
    errors |= dict(zip(addresses, lost, strict=True))
  return totals, errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Every:
  """Replicas meet every so many steps.

  Attributes:
    steps: of each replica by itself between two exchanges, the one that exchanges included.
  """

  steps: int = 16

  def __post_init__(self):
    check_fields(self, {'steps': (self.steps >= 1, 'a count of at least 1')})

  @property
  def start(self) -> int:
    """Steps until the first exchange."""
    return self.steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptive:
  """Replicas meet as often as the network lets them: by measured seconds.

  Attributes:
    share: the most that exchanges may take of the time of the steps between them.
    start: steps until the first exchange, and until there are measurements.
    most: steps, however slow the network is.
  """

  share: float = 0.1
  start: int = 4
  most: int = 128

  def __post_init__(self):
    check_fields(
      self,
      {
        'share': (self.share > 0, 'a share above 0'),
        'start': (self.start >= 2, 'a count of at least 2: else no step is without an exchange'),
        'most': (self.most >= self.start, 'a count of at least `start`'),
      },
    )

  def steps(self, step_seconds: float, exchange_seconds: float) -> int:
    """Returns how many steps there are to be between exchanges.

    At least 2: a step without an exchange is what an exchange is measured against.

    Args:
      step_seconds: of a step without an exchange.
      exchange_seconds: that one adds.
    """
    wanted = math.ceil(max(exchange_seconds, 0.0) / (self.share * step_seconds))
    return min(max(wanted, 2), self.most)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalSteps:
  """Replicas train by themselves, and from time to time agree on how far they have moved.

  Each has an optimizer of its own and steps along the gradient of its own rows. When it is due, the
  mean of what they have moved is exchanged, and all go on from there. Between exchanges nothing
  crosses but counts and scalars. It is another algorithm than one step for all, and its weights are
  others; what was measured of it, and what was not, is in experiments/gradient_compression.

  An outer optimizer (Nesterov's momentum) may take the mean for its gradient: that is DiLoCo, with
  a rate of 0.7 and a momentum of 0.9 after hundreds of steps. In the long run it goes rate /
  (1 − momentum) times as far as the replicas went, here 7 times; after few steps that is as if
  their learning rate were as many times larger.

  Attributes:
    interval: steps between exchanges.
    exchange: how what was moved is added up.
    outer_rate: learning rate of the outer optimizer; 1 without momentum takes the mean.
    momentum: of the outer optimizer.

  Source: Stich, arXiv 1805.09767, algorithm 1; the outer optimizer: Douillard et al. (DiLoCo),
    arXiv 2311.08105, algorithm 1.
  """

  interval: Every | Adaptive = Every()
  exchange: Exact | Quantised = Exact()
  outer_rate: float = 1.0
  momentum: float = 0.0

  def __post_init__(self):
    check_fields(
      self,
      {
        'outer_rate': (self.outer_rate > 0, 'a number above 0'),
        'momentum': (0 <= self.momentum < 1, 'a share in [0, 1)'),
      },
    )

  @property
  def feedback(self) -> ErrorFeedback | None:
    """What becomes of the errors of the exchange."""
    return self.exchange.feedback

  def update(self, params: Any, opt_state: Any, moved: Any) -> tuple[Any, Any]:
    """Returns new weights and outer momentum, by the mean [...] of what replicas have moved."""
    momentum = jax.tree.map(
      lambda old, new: self.momentum * old + new, opt_state['momentum'], moved
    )
    params = jax.tree.map(
      lambda weight, new, old: weight + self.outer_rate * (new + self.momentum * old),
      params,
      moved,
      momentum,
    )
    return params, {'momentum': momentum}
