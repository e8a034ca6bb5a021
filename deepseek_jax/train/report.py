"""From the arrays a step returns to the numbers a log shows."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.tree import flatten, unflatten
from deepseek_jax.layers.context import MODALITIES
from deepseek_jax.layers.moe import breaker, growth
from deepseek_jax.models.decoder import canonical, layer_of
from deepseek_jax.models.plan import Segment
from deepseek_jax.ops.breaker import OPEN
from deepseek_jax.optim.balance import dead_fraction, load_entropy, max_violation

LOGGED = ('selection_bias', growth.ACTIVE, growth.CHOICES, breaker.STATE)
"""Names of the buffers that a log says something of; tables and slots stay on the devices."""


def logged_buffers(buffers: dict[str, Any]) -> dict[str, Any]:
  """Returns the part of a nested dict of buffers that `LOGGED` names."""
  return unflatten(
    {
      address: leaf
      for address, leaf in flatten(buffers).items()
      if address.rpartition('/')[2] in LOGGED
    }
  )


def layer_loads(observed: dict[str, Any], segments: tuple[Segment, ...]) -> dict[str, np.ndarray]:
  """Returns the load [E] of every expert layer, by canonical layer address.

  Args:
    observed: the collection of one step, as NumPy arrays.
    segments: the plan of the stack.
  """
  return _by_layer(observed, segments, 'router/load')


def layer_biases(buffers: dict[str, Any], segments: tuple[Segment, ...]) -> dict[str, np.ndarray]:
  """Returns the selection bias [E] of every expert layer, by canonical layer address."""
  return _by_layer(buffers, segments, 'router/selection_bias')


def drop_rates(observed: dict[str, Any], segments: tuple[Segment, ...]) -> dict[str, float]:
  """Returns the share of the choices that reached no expert, by canonical layer address.

  Layers whose dispatch never drops are left out.

  Args:
    observed: the collection of one step, as NumPy arrays.
    segments: the plan of the stack.
  """
  choices = _by_layer(observed, segments, 'choices')
  dropped = _by_layer(observed, segments, 'dropped')
  return {layer: float(dropped[layer] / max(count, 1.0)) for layer, count in choices.items()}


def expert_figures(
  loads: dict[str, np.ndarray], biases: dict[str, np.ndarray], drops: dict[str, float]
) -> dict[str, Any]:
  """Returns what a log says of the experts.

  Args:
    loads: [E] counts by layer.
    biases: [E] selection biases by layer.
    drops: share of the choices that were dropped, by layer that may drop.

  Returns:
    `load`: shares of the tokens by layer; and lists with one entry a layer: `max_violation`
    (busiest expert over the mean, less 1), `dead_fraction` (experts without a token),
    `load_entropy` (1 is even), `bias_norm`, `drop_rate` (choices that found no room).
  """
  if not loads:
    return {}
  figures: dict[str, Any] = {
    'load': {
      address: (load / max(load.sum(), 1.0)).round(5).tolist() for address, load in loads.items()
    }
  }
  for name, measure in (
    ('max_violation', max_violation),
    ('dead_fraction', dead_fraction),
    ('load_entropy', load_entropy),
  ):
    figures[name] = [round(float(measure(jnp.asarray(load))), 5) for load in loads.values()]
  if biases:
    figures['bias_norm'] = [round(float(np.linalg.norm(bias)), 6) for bias in biases.values()]
  if drops:
    figures['drop_rate'] = [round(rate, 6) for rate in drops.values()]
  return figures


def modality_figures(observed: dict[str, Any], segments: tuple[Segment, ...]) -> dict[str, Any]:
  """Returns what a log says of the experts that each kind of media goes to.

  Args:
    observed: the collection of one step, as NumPy arrays.
    segments: the plan of the stack.

  Returns:
    `modality_load`: by layer and modality (`layers/1/image`), the shares of its choices, by expert;
    modalities that did not come are left out. Nothing where a model has none but text.
  """
  found, media = {}, False
  for address, load in _by_layer(observed, segments, 'router/modality/load').items():
    for kind, row in zip(MODALITIES, load):
      if row.any():
        found[f'{address}/{kind}'] = (row / row.sum()).round(5).tolist()
        media |= kind != 'text'
  return {'modality_load': found} if media else {}


def lifecycle_figures(buffers: dict[str, Any], segments: tuple[Segment, ...]) -> dict[str, Any]:
  """Returns what a log says of experts that come and go, lists with one entry a layer.

  Args:
    buffers: of the state, as NumPy arrays.
    segments: the plan of the stack.

  Returns:
    `active_experts` and `active_choices` where layers grow, `open_experts` (out of use) where they
    have a breaker.
  """
  figures: dict[str, list[float]] = {}
  for address, leaf in flatten(canonical(buffers, segments)).items():
    name = address.rsplit('/', 1)[-1]
    if name in (growth.ACTIVE, growth.CHOICES):
      figures.setdefault(name, []).append(float(leaf))
    elif name == breaker.STATE:
      figures.setdefault('open_experts', []).append(float(np.sum(np.asarray(leaf) == OPEN)))
  return figures


def attention_figures(observed: dict[str, Any], segments: tuple[Segment, ...]) -> dict[str, Any]:
  """Returns what a log says of indexers, lists with one entry a layer that has one.

  Args:
    observed: the collection of one step, as NumPy arrays.
    segments: the plan of the stack.

  Returns:
    Means over the queries that were looked into: `index_recall` (share of the keys with the most
    attention that were selected), `index_coverage` (share of the attention that goes to the
    selected), `index_divergence` (nats), `index_near` (share of the selected that are near).
  """
  flat = flatten(canonical(observed, segments))
  figures: dict[str, list[float]] = {}
  for address, queries in flat.items():
    prefix = address.removesuffix('/attention/indexer/queries')
    if prefix == address:
      continue
    for name in ('recall', 'coverage', 'divergence', 'near'):
      mean = float(flat[f'{prefix}/attention/indexer/{name}']) / max(float(queries), 1.0)
      figures.setdefault(f'index_{name}', []).append(round(mean, 5))
  return figures


def _by_layer(tree: Any, segments: tuple[Segment, ...], name: str) -> dict[str, np.ndarray]:
  suffix = f'/{name}'
  return {
    layer_of(address.removesuffix(suffix)): np.asarray(leaf)
    for address, leaf in flatten(canonical(tree, segments)).items()
    if address.endswith(f'/feed_forward{suffix}')
  }
