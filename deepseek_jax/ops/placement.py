"""Where experts lie: planning on the host, and the way from an expert to one of its slots.

A *slot* is a place for one expert on one device; all devices have as many. With more slots than
experts, experts that many tokens choose get several, their *replicas*, which take turns. Which
expert lies in which slot is planned from measured loads, such that devices have equal work.

Source: DeepSeek-V3, arXiv 2412.19437, section 3.4 (redundant experts); the two policies are those
  of DeepSeek's EPLB: hierarchical, which keeps the experts of a group on one node, and global.
"""

import jax
import jax.numpy as jnp
import numpy as np


def place(
  loads: np.ndarray, slots: int, devices: int, groups: int = 1, nodes: int = 1
) -> np.ndarray:
  """Plans which expert lies in which slot; greedy, equal loads give equal plans.

  Groups of experts are packed on nodes; in each node, the expert with the largest load a replica
  gets the next replica, until all slots are taken; these are packed on the node's devices. With
  one node this is the global policy: groups do not matter.

  Beyond the published policies, the same is tried with fewer replicas of heavy experts, and light
  ones in the slots left free; the best is taken. Where few experts have all the load, and their
  replicas are no multiple of the devices, some devices would have one more of them than others.
  On tiny cases, where every plan can be tried, the busiest device then has 1.01 to 1.03 times the
  least load possible on average, 1.23 times at worst; without, 1.05 to 1.13 and 1.63 times.

  Args:
    loads: [..., E] tokens that chose each expert, of any unit.
    slots: places for experts P on all devices together.
    devices: devices, each with P / devices slots.
    groups: equal groups of neighbouring experts, each to lie on one node.
    nodes: nodes, each with devices / nodes neighbouring devices.

  Returns:
    [..., P] int32, the expert of every slot; slots of one device are neighbours. Replicas of an
    expert lie on different devices as far as those of its node have room.

  Raises:
    ValueError: the numbers do not divide each other, or there are fewer slots than experts.
  """
  experts = loads.shape[-1]
  faults = placement_faults(experts, slots, devices, groups, nodes)
  if faults:
    raise ValueError('; '.join(faults))
  rows = loads.reshape(-1, experts).astype(np.float64)
  layers = len(rows)
  of_groups = rows.reshape(layers, groups, -1).sum(axis=2)
  size = experts // groups
  # Experts in the order of their nodes: [L · nodes, E / nodes].
  home = np.sort(pack(of_groups, nodes, groups // nodes), axis=2)
  local = (home[..., None] * size + np.arange(size)).reshape(layers * nodes, -1)
  of_local = np.take_along_axis(np.repeat(rows, nodes, axis=0), local, axis=1)

  best = np.full(layers, np.inf)
  found = np.zeros((layers, slots), int)
  for fillers in range((slots - experts) // nodes + 1):
    chosen = _fill(of_local, slots // nodes, devices // nodes, fillers)
    filled = np.take_along_axis(local, chosen, axis=1).reshape(layers, slots)
    worst = device_loads(rows, filled, devices).max(axis=1)
    better = worst < best
    best, found = np.where(better, worst, best), np.where(better[:, None], filled, found)
  found = np.sort(found.reshape(layers, devices, -1), axis=2)
  return found.reshape(*loads.shape[:-1], slots).astype(np.int32)


def _fill(loads: np.ndarray, slots: int, devices: int, fillers: int) -> np.ndarray:
  """Returns the expert of every slot [R, P], device by device, for loads [R, E].

  The last `fillers` slots are filled where there is room, with the lightest expert that the device
  does not have.
  """
  rows, experts = loads.shape
  row, size = np.arange(rows), slots // devices
  counts = replicate(loads, slots - fillers, devices)
  # Every row has as many replicas, so the flat list of them falls into rows again.
  numbers = np.tile(np.arange(experts), rows)
  kinds = np.repeat(numbers, counts.ravel()).reshape(rows, -1)
  of_items = np.take_along_axis(loads / counts, kinds, axis=1)
  items = pack(of_items, devices, size, kinds).reshape(rows, slots)
  found = np.where(items < 0, -1, np.take_along_axis(kinds, np.maximum(items, 0), axis=1))
  for _ in range(fillers):
    free = np.argmax(found < 0, axis=1)
    device = found.reshape(rows, devices, size)[row, free // size]
    held = (device[..., None] == np.arange(experts)).sum(axis=1)
    cost = loads / counts + held * (loads.sum(axis=1, keepdims=True) + 1)
    lightest = cost.argmin(axis=1)
    found[row, free] = lightest
    counts[row, lightest] += 1
  return found


def placement_faults(
  experts: int, slots: int, devices: int, groups: int = 1, nodes: int = 1
) -> list[str]:
  """Returns what is wrong with the numbers of a placement, as messages."""
  faults = []
  if slots < experts:
    faults.append(f'{slots} slots do not hold {experts} experts')
  for name, total, parts, of in (
    ('slots', slots, devices, 'devices'),
    ('experts', experts, groups, 'groups'),
    ('groups', groups, nodes, 'nodes'),
    ('devices', devices, nodes, 'nodes'),
  ):
    if total % parts:
      faults.append(f'{total} {name} are not divisible by {parts} {of}')
  return faults


def replicate(loads: np.ndarray, slots: int, most: int) -> np.ndarray:
  """Counts replicas: again and again, the largest load a replica gets one more.

  Args:
    loads: [R, E], every row by itself.
    slots: replicas of all experts together, at least E.
    most: replicas that are of use to one expert, the devices it can lie on. More are given only
      where every expert has as many.

  Returns:
    [R, E] int, 1 or more; the sum of a row is `slots`.
  """
  row, experts = np.arange(len(loads)), loads.shape[1]
  counts = np.ones(loads.shape, int)
  limit = max(most, -(-slots // experts))
  for _ in range(slots - experts):
    share = np.where(counts < limit, loads / counts, -1.0)
    # Of equal shares, zeros above all, the one with the fewest replicas.
    tied = share == share.max(axis=1, keepdims=True)
    counts[row, np.where(tied, counts, slots + 1).argmin(axis=1)] += 1
  return counts


def pack(loads: np.ndarray, packs: int, size: int, kinds: np.ndarray | None = None) -> np.ndarray:
  """Puts items into packs: heaviest first, each into the lightest with room.

  Args:
    loads: [R, n], every row by itself.
    packs: how many.
    size: items that a pack has room for.
    kinds: [R, n] int; items of one kind go to different packs as far as there are any with room.

  Returns:
    [R, packs, size] int, the items of every pack, heaviest first; -1 where there is room left.
  """
  rows, items = loads.shape
  row = np.arange(rows)
  found = np.full((rows, packs, size), -1)
  weight, room = np.zeros((rows, packs)), np.full((rows, packs), size)
  kinds = np.broadcast_to(np.arange(items), loads.shape) if kinds is None else kinds
  copies = np.zeros((rows, packs, kinds.max() + 1))
  # More than any pack can weigh: what every copy in a pack costs.
  penalty = loads.sum(axis=1, keepdims=True) + 1
  for item in np.argsort(-loads, axis=1, kind='stable').T:
    kind = kinds[row, item]
    cost = np.where(room > 0, weight + penalty * copies[row, :, kind], np.inf)
    best = cost.argmin(axis=1)
    found[row, best, size - room[row, best]] = item
    weight[row, best] += loads[row, item]
    room[row, best] -= 1
    copies[row, best, kind] += 1
  return found


def device_loads(loads: np.ndarray, slots: np.ndarray, devices: int) -> np.ndarray:
  """Returns the load of every device [..., devices] under a placement.

  Args:
    loads: [..., E] tokens that chose each expert; replicas share theirs equally.
    slots: [..., P] expert of every slot, with the same leading axes.
    devices: that the slots lie on, neighbours together.
  """
  counts = (slots[..., None] == np.arange(loads.shape[-1])).sum(axis=-2)
  share = np.take_along_axis(loads / np.maximum(counts, 1), slots, axis=-1)
  return share.reshape(*share.shape[:-1], devices, -1).sum(axis=-1)


def imbalance(loads: np.ndarray) -> np.ndarray:
  """Returns the largest load over the mean [...] of loads [..., n]; 1 is even, or no load."""
  mean = loads.mean(axis=-1)
  return np.where(mean > 0, loads.max(axis=-1) / np.where(mean > 0, mean, 1), 1.0)


def to_slots(experts: jax.Array, slots: jax.Array, count: int) -> jax.Array:
  """Sends every token's choice of an expert to a slot of it: replicas take turns by token.

  Args:
    experts: [N, K] int32 chosen experts, from 0 to E; E is nobody.
    slots: [P] int32 expert of every slot; every expert has one or more.
    count: number of experts E.

  Returns:
    [N, K] int32 from 0 to P; P is nobody.
  """
  order = jnp.argsort(slots, stable=True).astype(jnp.int32)
  replicas = jnp.zeros(count, jnp.int32).at[slots].add(1)
  first = jnp.cumsum(replicas) - replicas
  known = jnp.minimum(experts, count - 1)
  turn = jnp.arange(len(experts), dtype=jnp.int32)[:, None] % replicas[known]
  return jnp.where(experts < count, order[first[known] + turn], len(slots))
