"""A breaker for experts: finding the one that is at fault, and what becomes of it.

An expert is *closed* (in use), *open* (out of use) or *half-open* (on trial). What is found where:
weights before they are used; outputs after; gradients on their way back. The functions here are of
arrays; `layers/moe/breaker.py` puts them into a layer and `train/expert_lifecycle.py` into a step.

Source: the three states are those of Nygard, Release It! (2007), section 5.2.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

CLOSED, OPEN, HALF_OPEN = 0.0, 1.0, 2.0


class Verdict(NamedTuple):
  """What becomes of every expert at the end of a step.

  Attributes:
    state: [..., E] float32, `CLOSED`, `OPEN` or `HALF_OPEN`.
    since: [..., E] float32, finished steps when that began.
    opened: [..., E] bool, those that go out of use now.
    retried: [..., E] bool, those that go on trial now: their weights are to be made anew.
    passed: [..., E] bool, those that are back in use now.
  """

  state: jax.Array
  since: jax.Array
  opened: jax.Array
  retried: jax.Array
  passed: jax.Array


def judge(
  state: jax.Array,
  since: jax.Array,
  fault: jax.Array,
  finished: jax.Array,
  *,
  cooldown: int,
  trial: int,
) -> Verdict:
  """Moves the state of every expert on by one step.

  A fault opens an expert that is in use or on trial. After `cooldown` steps it is tried again, if
  any other of its layer is closed: that is what its weights are made from. After `trial` steps
  without a fault it is closed. A fault of an open expert says nothing new.

  Args:
    state: [..., E] before the step.
    since: [..., E] finished steps when that began.
    fault: [..., E] bool, found in this step.
    finished: [] finished steps, this one among them.
    cooldown: steps out of use.
    trial: steps on trial.
  """
  waited = finished.astype(jnp.float32) - since
  opened = fault & (state != OPEN)
  healthy = jnp.any((state == CLOSED) & ~fault, axis=-1, keepdims=True)
  retried = (state == OPEN) & (waited >= cooldown) & healthy
  passed = (state == HALF_OPEN) & ~fault & (waited >= trial)
  new = jnp.where(opened, OPEN, jnp.where(retried, HALF_OPEN, jnp.where(passed, CLOSED, state)))
  since = jnp.where(opened | retried | passed, finished.astype(jnp.float32), since)
  return Verdict(new, since, opened, retried, passed)


def nearest(healthy: jax.Array, start: jax.Array) -> jax.Array:
  """Finds for every expert the first healthy one, counting up from a given one and around.

  Args:
    healthy: [..., E] bool.
    start: [..., E] int32, where the search of each expert begins.

  Returns:
    [..., E] int32; the start itself where none is healthy.
  """
  count = healthy.shape[-1]
  away = (jnp.arange(count) - start[..., None]) % count
  away = jnp.where(healthy[..., None, :], away, count + away)
  return jnp.argmin(away, axis=-1).astype(jnp.int32)


def finite_experts(matrices: tuple[jax.Array, ...]) -> jax.Array:
  """Says of every expert whether all its weights, [E, ·, ·] each, are finite: [E] bool.

  A sum is finite only if all its terms are; it is read once and stored nowhere. A sum of finite
  weights that overflows is a fault too: nothing sound comes out of such weights.
  """
  return jnp.isfinite(sum(jnp.sum(w, axis=(1, 2), dtype=jnp.float32) for w in matrices))


@jax.custom_vjp
def watch_matrices(
  matrices: tuple[jax.Array, ...], state: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """Returns the matrices [E, ·, ·] as they are, and a signal [] for `watch_output`.

  The gradient of `state` [E] is no gradient but a report: 1 for every expert whose weights have a
  gradient that is not finite, though all that came back to the layer's output was finite. So what
  went wrong elsewhere is blamed on nobody, be it in the same row of the batch or in another layer.
  """
  return matrices, jnp.zeros((), jnp.float32)


def _watch_forward(matrices, state):
  return watch_matrices(matrices, state), None


def _watch_backward(_, back):
  grads, spoilt = back
  return grads, jnp.where(finite_experts(grads) | (spoilt != 0), 0.0, 1.0)


watch_matrices.defvjp(_watch_forward, _watch_backward)


@jax.custom_vjp
def watch_output(y: jax.Array, signal: jax.Array) -> jax.Array:
  """Returns `y` [N, D] as it is; tells the signal [] if what comes back to it is not finite."""
  return y


def _output_forward(y, signal):
  return y, None


def _output_backward(_, grad):
  return grad, jnp.where(jnp.all(jnp.isfinite(grad)), 0.0, 1.0)


watch_output.defvjp(_output_forward, _output_backward)


def output_faults(
  run: Callable[[jax.Array, jax.Array], jax.Array],
  x: jax.Array,
  y: jax.Array,
  experts: jax.Array,
  count: int,
) -> jax.Array:
  """Finds the experts that make something infinite of something finite.

  Nothing is computed where `y` is finite. Else every choice is run by itself, with weight 1.

  Args:
    run: (experts [N, 1], weights [N, 1]) -> [N, D], the sum over choices; not differentiated.
    x: [N, D] what the experts were given.
    y: [N, D] what came out.
    experts: [N, K] int32 chosen; `count` is nobody.
    count: number of experts E.

  Returns:
    [E] float32, 1 for each at fault.
  """
  given = jnp.all(jnp.isfinite(x), axis=-1)

  def probe() -> jax.Array:
    def one(found: jax.Array, chosen: jax.Array) -> tuple[jax.Array, None]:
      result = run(chosen[:, None], jnp.ones((len(chosen), 1), jnp.float32))
      bad = given & ~jnp.all(jnp.isfinite(result), axis=-1)
      return found.at[chosen].max(bad.astype(jnp.float32), mode='drop'), None

    return jax.lax.scan(one, jnp.zeros(count, jnp.float32), experts.T)[0]

  return jax.lax.cond(jnp.all(jnp.isfinite(y)), lambda: jnp.zeros(count, jnp.float32), probe)
