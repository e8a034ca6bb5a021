"""What placing experts by their load would do for a run, from the loads in its log.

The load of a device is the sum of what its slots are sent; the device with the largest makes all
others wait, so the largest over the mean, less 1, is time lost.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.ops.placement import device_loads, imbalance, place, placement_faults


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPlacement:
  """Largest load of a device over the mean, averaged over windows of the log; 1 is even.

  Attributes:
    layer: canonical address, such as 'layers/3'.
    in_order: experts lie on the devices in their order, each once.
    packed: planned, each expert once; judged by the loads that it was planned from.
    replicated: planned with all slots; judged by the loads that it was planned from.
    ahead: planned with all slots from the window before: what a run would get.
  """

  layer: str
  in_order: float
  packed: float
  replicated: float
  ahead: float


def plan_placement(
  rows: Sequence[Mapping[str, Any]],
  devices: int,
  slots: int,
  groups: int = 1,
  nodes: int = 1,
  window: int = 10,
) -> list[LayerPlacement]:
  """Plans a placement for every window of a log, and measures it on the next one.

  Args:
    rows: of `metrics.jsonl`; those without a `load` are left out.
    devices: that share the experts.
    slots: places for experts on all devices together.
    groups: equal groups of neighbouring experts, each to lie on one node.
    nodes: that the devices are on; 1 is the global policy.
    window: rows whose loads are summed; what is left over at the end is not used.

  Returns:
    One entry a layer.

  Raises:
    ConfigError: the rows are fewer than two windows, or the numbers do not divide each other.
  """
  logged = [row['load'] for row in rows if row.get('load')]
  count = len(logged) // window
  if count < 2:
    raise ConfigError(f'found {len(logged)} rows with a load, expected two windows of {window}')
  found = []
  for layer in logged[0]:
    shares = np.array([load[layer] for load in logged[: count * window]])
    loads = shares.reshape(count, window, -1).sum(axis=1)
    experts = loads.shape[1]
    faults = placement_faults(experts, slots, devices, groups, nodes)
    if experts % devices:
      faults.append(f'{experts} experts are not divisible by {devices} devices')
    if faults:
      raise ConfigError(f'{layer}: {fault}' for fault in faults)
    planned = place(loads, slots, devices, groups, nodes)
    once = place(loads, experts, devices, groups, nodes)
    in_order = np.broadcast_to(np.arange(experts), loads.shape)

    def worst(loads: np.ndarray, lie: np.ndarray) -> float:
      return float(imbalance(device_loads(loads, lie, devices)).mean())

    found.append(
      LayerPlacement(
        layer=layer,
        in_order=worst(loads[1:], in_order[1:]),
        packed=worst(loads[1:], once[1:]),
        replicated=worst(loads[1:], planned[1:]),
        ahead=worst(loads[1:], planned[:-1]),
      )
    )
  return found


def placement_table(layers: Sequence[LayerPlacement]) -> str:
  """Returns the table in text: a line a layer, and their mean where there are several."""
  names = [field.name for field in dataclasses.fields(LayerPlacement)][1:]
  table = [[layer.layer, *(getattr(layer, name) for name in names)] for layer in layers]
  if len(layers) > 1:
    means = np.array([row[1:] for row in table], float).mean(axis=0)
    table.append(['mean', *means.tolist()])
  heads = ['layer', *(name.replace('_', ' ') for name in names)]
  width = max(len(str(row[0])) for row in table)
  lines = [f'{heads[0]:<{width}}' + ''.join(f'{head:>12}' for head in heads[1:])]
  lines += [f'{row[0]:<{width}}' + ''.join(f'{x:>12.3f}' for x in row[1:]) for row in table]
  return '\n'.join(lines)
