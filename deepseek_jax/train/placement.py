"""Placing experts anew while a run goes on, from the loads that it has seen."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.tree import flatten, unflatten
from deepseek_jax.layers.moe.dispatch.capacity import Capacity
from deepseek_jax.layers.moe.dispatch.local import Local
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.placement import SLOTS, TOKENS
from deepseek_jax.models.decoder import canonical, layer_of
from deepseek_jax.models.plan import Segment
from deepseek_jax.ops.placement import device_loads, imbalance, place, placement_faults
from deepseek_jax.sharding.host_rows import fetch, put_whole
from deepseek_jax.sharding.rules import Rules

LOAD = 'router/load'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Global:
  """Any expert lies on any device.

  Source: DeepSeek's EPLB, global policy: for many devices, each with few slots.
  """

  groups = 1
  nodes = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hierarchical:
  """The experts of a group lie on one node, so that a token with few groups goes to few nodes.

  Attributes:
    groups: equal groups of neighbouring experts, such as those of the router.
    nodes: equal sets of neighbouring devices.

  Source: DeepSeek's EPLB, hierarchical policy: for few devices, each with many slots.
  """

  groups: int
  nodes: int

  def __post_init__(self):
    errors = [
      f'`{name}` is {size}; expected 1 or more'
      for name in ('groups', 'nodes')
      if (size := getattr(self, name)) < 1
    ]
    if not errors and self.groups % self.nodes:
      errors.append(f'`groups` is {self.groups}, not divisible by the {self.nodes} `nodes`')
    if errors:
      raise ConfigError(errors)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rebalance:
  """Every so often, fills the slots of layers with `Replicas` by the loads since the last time.

  The devices are those that the rules spread experts over; with one there is nothing to place. The
  dispatch must be one by which tokens travel to the experts' devices. A layer whose busiest device
  would have no less to do stays as it is. Only a buffer changes: nothing is compiled, and what a
  model computes stays the same.

  Attributes:
    every: steps from one placement to the next.
    policy: which devices are open to an expert.
  """

  every: int = 100
  policy: Global | Hierarchical = Global()

  def __post_init__(self):
    if self.every < 1:
      raise ConfigError(f'`every` is {self.every}; expected 1 or more')


def expert_devices(rules: Rules, sizes: Mapping[str, int]) -> int:
  """Returns how many devices share the experts, on a mesh of these sizes."""
  return math.prod(sizes[axis] for axis in rules.expert)


def check_placement(
  rebalance: Rebalance | None, mixtures: Iterable[MoE], devices: int
) -> list[str]:
  """Returns what is wrong with the slots of a model's layers, as messages.

  Args:
    rebalance: of the run.
    mixtures: layers.
    devices: that share the experts.
  """
  placed = [mixture for mixture in mixtures if mixture.placement is not None]
  if not placed and rebalance is not None:
    return ['placement: no layer of the model has slots to fill; try MoE(placement=Replicas(…))']
  policy = Global() if rebalance is None else rebalance.policy
  errors = [
    f'placement: dispatch {type(mixture.dispatch).__name__} brings the experts to the tokens, so '
    'that it does not matter where they lie; try AllToAll'
    for mixture in placed
    if rebalance is not None and isinstance(mixture.dispatch, Local | Capacity)
  ]
  errors += [
    f'placement: {message}'
    for mixture in placed
    for message in placement_faults(
      mixture.experts, mixture.slots, devices, policy.groups, policy.nodes
    )
  ]
  return list(dict.fromkeys(errors))


class Placed(NamedTuple):
  """What a placement did.

  Attributes:
    buffers: with new slots, and the counts of tokens at zero.
    before: layer, such as 'layers/3' → largest load of a device over the mean, as it was.
    after: the same with the new slots and the same loads.
  """

  buffers: dict[str, Any]
  before: dict[str, float]
  after: dict[str, float]


def count_tokens(buffers: Mapping[str, Any], observed: Mapping[str, Any]) -> dict[str, Any]:
  """Adds a step's loads to the counts [..., E] beside the slots of every layer.

  Args:
    buffers: nested dict.
    observed: nested dict, with the layer's load [..., E] at the same address.
  """
  flat, loads = flatten(buffers), flatten(observed)
  for address in flat:
    layer, _, name = address.rpartition('/')
    if name == TOKENS:
      flat[address] += loads[f'{layer}/{LOAD}']
  return unflatten(flat)


def rebalance(
  buffers: Mapping[str, Any],
  policy: Global | Hierarchical,
  devices: int,
  segments: tuple[Segment, ...],
) -> Placed:
  """Plans where experts lie by the tokens counted, and puts the plan where the old one was.

  Args:
    buffers: nested dict of finished arrays.
    policy: which devices are open to an expert.
    devices: that share the slots.
    segments: the plan of the stack.
  """
  flat = flatten(buffers)
  before, after = {}, {}
  for address, old in list(flat.items()):
    layer, _, name = address.rpartition('/')
    if name != SLOTS:
      continue
    tokens = flat[f'{layer}/{TOKENS}']
    loads, lie = fetch(tokens), fetch(old)
    planned = place(loads, lie.shape[-1], devices, policy.groups, policy.nodes)
    worst = [imbalance(device_loads(loads, slots, devices)) for slots in (lie, planned)]
    better = worst[1] < worst[0]
    before[layer], after[layer] = worst[0], np.where(better, worst[1], worst[0])
    flat[address] = put_whole(np.where(better[..., None], planned, lie), old.sharding)
    flat[f'{layer}/{TOKENS}'] = put_whole(np.zeros_like(loads), tokens.sharding)
  return Placed(unflatten(flat), *(_by_layer(worst, segments) for worst in (before, after)))


def _by_layer(found: Mapping[str, np.ndarray], segments: tuple[Segment, ...]) -> dict[str, float]:
  """Turns the figures [...] of an address into one of each layer."""
  flat = flatten(canonical(unflatten(found), segments))
  return {layer_of(address): float(figure) for address, figure in flat.items()}
