"""The step's side of experts that come and go: born as a layer grows, opened and tried again.

It works on the state that a step leaves, accepted or skipped: the counts and states are buffers of
each layer, and copying touches one expert at a time, in place, so that a step in which nobody comes
or goes costs nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.core.tree import flatten, unflatten
from deepseek_jax.layers.moe import breaker as breaker_layer
from deepseek_jax.layers.moe import growth as growth_layer
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.cost import blocks_by_address
from deepseek_jax.ops.breaker import CLOSED, OPEN, judge, nearest
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.expert_copy import Copies, copy_experts
from deepseek_jax.train.state import TrainState

EVENTS = ('', 'weights', 'output', 'gradient', 'retried', 'closed', 'born')
"""What happened to an expert in a step, by number: opened for one of three reasons; put on trial;
back in use; born. 0 is nothing."""
WEIGHTS, OUTPUT, GRADIENT, RETRIED, PASSED, BORN = range(1, 7)

Report = dict[str, Any]
Taps = dict[str, jax.Array]


class Layer(NamedTuple):
  """A layer, or the layers of one scan, whose experts come and go.

  Attributes:
    address: of its feed-forward in `params` and `buffers`.
    moe: its config.
  """

  address: str
  moe: MoE


def find_layers(experiment: Experiment) -> list[Layer]:
  """Lists the layers with a growth or a breaker."""
  return [
    Layer(f'{prefix}feed_forward', block.feed_forward)
    for prefix, block in blocks_by_address(experiment.model, experiment.segments)
    if isinstance(block.feed_forward, MoE)
    and (block.feed_forward.growth is not None or block.feed_forward.breaker is not None)
  ]


def split_taps(buffers: Any) -> Taps:
  """Returns the breakers' states by address: their gradient is a report, see `watch_matrices`."""
  name = f'/{breaker_layer.STATE}'
  return {address: leaf for address, leaf in flatten(buffers).items() if address.endswith(name)}


def with_taps(buffers: Any, taps: Taps) -> Any:
  """Returns the buffers with the arrays that `split_taps` took out."""
  return unflatten({**flatten(buffers), **taps}) if taps else buffers


def make_lifecycle(
  experiment: Experiment, axes: Any
) -> Callable[[TrainState, TrainState, Any, Taps], tuple[TrainState, Report]]:
  """Returns the function that lets experts come and go at the end of a step.

  Args:
    experiment: the run.
    axes: logical axis names of every parameter.

  Returns:
    `advance(before, settled, observed, taps) -> (state, report)`: the state before the step and as
    the guard left it, what layers observed, and the gradients of the taps, both summed over
    microbatches.
    The report is empty where there is no such layer; else it holds `experts`: `changed` [] bool,
    `usable` [] fewest experts in use in any layer, and `events`, a tree with numbers of `EVENTS`
    [..., E] at each layer's address.
  """
  layers = find_layers(experiment)
  if not layers:
    return lambda before, settled, observed, taps: (settled, {})
  growths = {
    layer.address: layer.moe.growth.build(
      layer.moe.experts, layer.moe.top_k, experiment.train_steps
    )
    for layer in layers
    if layer.moe.growth is not None
  }

  def advance(
    before: TrainState, settled: TrainState, observed: Any, taps: Taps
  ) -> tuple[TrainState, Report]:
    finished = before.step + 1
    seen, buffers = flatten(observed), flatten(settled.buffers)
    blame_gradients = _scale_is_not_to_blame(before, settled, experiment)
    copies, events, usable = {}, {}, []
    for layer in layers:
      old = _Experts.read(layer, buffers)
      faults = _faults(layer, seen, taps, blame_gradients)
      new, copies[layer.address], events[layer.address] = _next(
        layer, old, faults, finished, growths.get(layer.address)
      )
      buffers |= new.write(layer, buffers)
      usable.append(jnp.min(jnp.sum(new.usable, axis=-1)))
    state = dataclasses.replace(settled, buffers=unflatten(buffers))
    key = jax.random.fold_in(jax.random.key(experiment.seed), finished)
    state = copy_experts(state, axes, copies, key)
    changed = jnp.any(jnp.stack([jnp.any(event > 0) for event in events.values()]))
    report = {'changed': changed, 'usable': jnp.min(jnp.stack(usable)), 'events': unflatten(events)}
    return state, {'experts': report}

  return advance


@dataclasses.dataclass(frozen=True)
class _Experts:
  """The buffers of a layer's lifecycle.

  `active` and `choices` are [...] counts; `state` and `since` are [..., E].
  """

  active: jax.Array
  choices: jax.Array
  state: jax.Array
  since: jax.Array

  @property
  def grown(self) -> jax.Array:
    """[..., E] bool, experts that growth has come to."""
    return jnp.arange(self.state.shape[-1]) < self.active[..., None]

  @property
  def usable(self) -> jax.Array:
    """[..., E] bool, experts that may be chosen."""
    return self.grown & (self.state != OPEN)

  @staticmethod
  def read(layer: Layer, buffers: Mapping[str, jax.Array]) -> '_Experts':
    """Takes what there is; what is not there is as without growth or breaker."""
    moe, at = layer.moe, layer.address
    if moe.breaker is not None:
      state = buffers[f'{at}/{breaker_layer.STATE}']
      since = buffers[f'{at}/{breaker_layer.SINCE}']
    else:
      lead = buffers[f'{at}/{growth_layer.ACTIVE}'].shape
      state = since = jnp.full((*lead, moe.experts), CLOSED)
    if moe.growth is not None:
      active = buffers[f'{at}/{growth_layer.ACTIVE}']
      choices = buffers[f'{at}/{growth_layer.CHOICES}']
    else:
      active = jnp.full(state.shape[:-1], float(moe.experts))
      choices = jnp.full(state.shape[:-1], float(moe.top_k))
    return _Experts(active, choices, state, since)

  def write(self, layer: Layer, buffers: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the buffers that the layer has, by address."""
    values = {
      breaker_layer.STATE: self.state,
      breaker_layer.SINCE: self.since,
      growth_layer.ACTIVE: self.active,
      growth_layer.CHOICES: self.choices,
    }
    found = {f'{layer.address}/{name}': value for name, value in values.items()}
    return {name: value for name, value in found.items() if name in buffers}


def _next(
  layer: Layer, old: _Experts, faults: jax.Array, finished: jax.Array, growth: Any
) -> tuple[_Experts, Copies, jax.Array]:
  """What becomes of a layer: its buffers, who is made anew, and what happened [..., E]."""
  moe, count = layer.moe, layer.moe.experts
  event = jnp.zeros(old.state.shape, jnp.int32)
  noise = jnp.zeros(old.state.shape, jnp.float32)
  state, since, fresh = old.state, old.since, jnp.zeros(old.state.shape, bool)
  start = jnp.broadcast_to(jnp.arange(count), old.state.shape)
  if moe.breaker is not None:
    faults = jnp.where(old.grown, faults, 0)
    judged = judge(
      state,
      since,
      faults > 0,
      finished,
      cooldown=moe.breaker.cooldown,
      trial=moe.breaker.trial,
    )
    state, since, fresh = judged.state, judged.since, judged.retried
    noise = jnp.where(fresh, moe.breaker.noise, noise)
    event = jnp.where(judged.opened, faults, event)
    event = jnp.where(judged.retried, RETRIED, event)
    event = jnp.where(judged.passed, PASSED, event)
  active, choices = old.active, old.choices
  if growth is not None and moe.growth is not None:
    # What is stated for the next step. A count never falls: weights that begin with another run's
    # may be further than the schedule is.
    wanted = growth(finished)
    active, choices = jnp.maximum(active, wanted[0]), jnp.maximum(choices, wanted[1])
    born = (jnp.arange(count) < active[..., None]) & ~old.grown
    start = jnp.where(born, start % old.active[..., None].astype(jnp.int32), start)
    fresh, noise = fresh | born, jnp.where(born, moe.growth.noise, noise)
    event = jnp.where(born, BORN, event)
  healthy = old.grown & (state == CLOSED)
  fresh &= jnp.any(healthy, axis=-1, keepdims=True)
  return (
    _Experts(active, choices, state, since),
    Copies(fresh, nearest(healthy, start), noise),
    event,
  )


def _faults(
  layer: Layer, seen: Mapping[str, jax.Array], taps: Taps, blame_gradients: jax.Array
) -> jax.Array:
  """What was found wrong with each expert of a layer, [..., E] int32 of `EVENTS`; 0 is nothing."""
  if layer.moe.breaker is None:
    return jnp.int32(0)
  at = f'{layer.address}/breaker'
  gradient = taps[f'{layer.address}/{breaker_layer.STATE}'] > 0
  # Where no expert that met a token is well, the fault is not one expert's.
  met = seen[f'{layer.address}/router/load'] > 0
  gradient &= blame_gradients & jnp.any(met & ~gradient, axis=-1, keepdims=True)
  return jnp.where(
    seen[f'{at}/weights'] > 0,
    WEIGHTS,
    jnp.where(seen[f'{at}/output'] > 0, OUTPUT, jnp.where(gradient, GRADIENT, 0)),
  )


def _scale_is_not_to_blame(
  before: TrainState, settled: TrainState, experiment: Experiment
) -> jax.Array:
  """False where a loss scale was lowered: then that is what gradients overflowed of."""
  if experiment.precision.scaling is None:
    return jnp.bool_(True)
  return ~(settled.guard.scaling.scale < before.guard.scaling.scale)
