"""Experts made anew as copies of others, in every part of a training state."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.core.tree import flatten, unflatten
from deepseek_jax.optim.balance import BIAS
from deepseek_jax.train.state import TrainState

COUNTS = ('expert', 'routed')
LAYERS = ('layers', 'stage')
"""Axes that count experts: of their own weights, and of what a router knows them by."""

type Axes = tuple[str | None, ...]


class Copies(NamedTuple):
  """Which experts of a layer, or of the layers of a scan, are made anew.

  Attributes:
    fresh: [..., E] bool.
    donors: [..., E] int32, whose copy each becomes.
    noise: [..., E] float32, standard deviation of the noise as a share of that of each array.
  """

  fresh: jax.Array
  donors: jax.Array
  noise: jax.Array


class _Place(NamedTuple):
  """An expert: which layer of its scan it is in, and which one it is there; [] int32 each."""

  row: jax.Array
  expert: jax.Array


def copy_experts(
  state: TrainState, axes: Any, copies: Mapping[str, Copies], key: jax.Array
) -> TrainState:
  """Makes experts anew.

  Copied, with noise, is every parameter that has an axis of experts, whatever its name, and without
  noise the selection bias. An averaged weight becomes the weight: it begins where that does. What
  the optimizer keeps at a parameter's address becomes zero. It is a loop of as many turns as there
  are copies, each of which touches one expert where it lies.

  Args:
    state: of the run.
    axes: logical axis names of every parameter, as nested dicts.
    copies: which experts, by address of their feed-forward in `params` and `buffers`.
    key: of the noise.
  """
  # Empty where there are none.
  averaged = state.ema or {}
  trees: dict[str, Any] = {
    'params': flatten(state.params),
    'ema': flatten(averaged),
    'buffers': flatten(state.buffers),
    'memory': dict(enumerate(jax.tree.leaves(state.opt_state))),
  }
  names, owners = flatten(axes), _owners(state.opt_state, trees['params'])
  for number, (address, wanted) in enumerate(copies.items()):
    weights = {
      name: tuple(known)
      for name, known in names.items()
      if name.startswith(f'{address}/') and set(known) & set(COUNTS)
    }
    bias = f'{address}/router/{BIAS}'
    stacked = ('layers',) * (wanted.fresh.ndim - 1)
    places: dict[str, dict[Any, Axes]] = {
      'params': weights,
      'ema': {name: known for name, known in weights.items() if name in trees['ema']},
      'buffers': {bias: (*stacked, 'routed')} if bias in trees['buffers'] else {},
      'memory': {at: weights[owner] for at, owner in owners.items() if owner in weights},
    }
    given = {part: {name: trees[part][name] for name in known} for part, known in places.items()}
    made = _copy_layer(given, places, wanted, jax.random.fold_in(key, number))
    for part, arrays in made.items():
      trees[part] |= arrays
  structure = jax.tree.structure(state.opt_state)
  memory = [trees['memory'][at] for at in range(len(trees['memory']))]
  return dataclasses.replace(
    state,
    params=unflatten(trees['params']),
    buffers=unflatten(trees['buffers']),
    opt_state=jax.tree.unflatten(structure, memory),
    ema=unflatten(trees['ema']) if trees['ema'] else state.ema,
  )


def _copy_layer(
  given: dict[str, dict[Any, jax.Array]],
  places: Mapping[str, Mapping[Any, Axes]],
  copies: Copies,
  key: jax.Array,
) -> dict[str, dict[Any, jax.Array]]:
  """Copies expert by expert, in the arrays of one layer or of the layers of one scan."""
  count = copies.fresh.shape[-1]
  fresh, donors, noise = (x.reshape(-1) for x in copies)
  # Of several layers, the number of an expert is layer · E + expert; those to be made come first.
  order = jnp.argsort(~fresh, stable=True)

  def turn(at: jax.Array, arrays: dict[str, dict[Any, jax.Array]]):
    chosen = order[at]
    new = _Place(chosen // count, chosen % count)
    old = _Place(new.row, donors[chosen].astype(new.row.dtype))
    own = jax.random.fold_in(key, chosen)
    result: dict[str, dict[Any, jax.Array]] = {part: {} for part in arrays}
    for number, (name, axes) in enumerate(places['params'].items()):
      part = _read(arrays['params'][name], axes, old)
      draw = jax.random.normal(jax.random.fold_in(own, number), part.shape, part.dtype)
      part += noise[chosen] * jnp.std(part) * draw
      for tree in ('params', 'ema'):
        if name in arrays[tree]:
          result[tree][name] = _write(arrays[tree][name], axes, new, part)
    for name, axes in places['buffers'].items():
      array = arrays['buffers'][name]
      result['buffers'][name] = _write(array, axes, new, _read(array, axes, old))
    for name, axes in places['memory'].items():
      array = arrays['memory'][name]
      nothing = jnp.zeros(_sizes(array, axes), array.dtype)
      result['memory'][name] = _write(array, axes, new, nothing)
    return result

  return jax.lax.fori_loop(0, jnp.sum(fresh), turn, given)


def _sizes(array: jax.Array, axes: Axes) -> list[int]:
  """The shape of one expert's part of an array."""
  return [1 if name in (*COUNTS, *LAYERS) else n for name, n in zip(axes, array.shape)]


def _starts(axes: Axes, place: _Place) -> list[jax.Array]:
  """Where one expert's part of an array begins."""
  zero = jnp.zeros_like(place.row)
  known = {**dict.fromkeys(LAYERS, place.row), **dict.fromkeys(COUNTS, place.expert)}
  return [zero if name is None else known.get(name, zero) for name in axes]


def _read(array: jax.Array, axes: Axes, place: _Place) -> jax.Array:
  return jax.lax.dynamic_slice(array, _starts(axes, place), _sizes(array, axes))


def _write(array: jax.Array, axes: Axes, place: _Place, part: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice(array, part.astype(array.dtype), _starts(axes, place))


def _owners(opt_state: Any, params: Mapping[str, jax.Array]) -> dict[int, str]:
  """Number of each leaf of the optimizer's that lies at a parameter's address → that address."""
  found = {}
  for at, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(opt_state)):
    names = [str(getattr(key, 'key', getattr(key, 'name', key))) for key in path]
    tails = ('/'.join(names[start:]) for start in range(len(names)))
    owner = next((tail for tail in tails if tail in params), None)
    if owner is not None and params[owner].shape == leaf.shape:
      found[at] = owner
  return found
