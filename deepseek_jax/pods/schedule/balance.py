"""Where to cut a model into chunks, so that the slowest is as fast as can be."""

import dataclasses
import itertools
from collections.abc import Sequence

from deepseek_jax.core.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
  """A model cut into chunks of neighbouring units.

  Attributes:
    sizes: units in each chunk, first to last.
    totals: cost of each chunk.
    bound: no cut into as many chunks can have a cheaper dearest one: the mean, or the dearest unit.
  """

  sizes: tuple[int, ...]
  totals: tuple[float, ...]
  bound: float

  @property
  def bounds(self) -> tuple[tuple[int, int], ...]:
    """The first unit of each chunk, and the first beyond it."""
    found, start = [], 0
    for size in self.sizes:
      found.append((start, start + size))
      start += size
    return tuple(found)

  @property
  def mean(self) -> float:
    """Mean cost of a chunk."""
    return sum(self.totals) / len(self.totals)

  @property
  def spread(self) -> float:
    """Dearest less cheapest chunk, as a share of the mean."""
    return (max(self.totals) - min(self.totals)) / self.mean

  @property
  def excess(self) -> float:
    """Dearest chunk over the mean, less 1: what all others wait, microbatch by microbatch."""
    return max(self.totals) / self.mean - 1


def cut_evenly(costs: Sequence[float], chunks: int) -> Cut:
  """Cuts units in order into chunks, the dearest as cheap as possible; found exactly.

  Of the cuts with the cheapest dearest chunk it takes one whose chunks have the smallest sum of
  squares. Dynamic programming over (chunk, unit), once for either: O(chunks · units²).

  Args:
    costs: of each unit, 0 or more.
    chunks: how many; each gets at least one unit.

  Raises:
    ConfigError: there are fewer units than chunks.
  """
  if not 1 <= chunks <= len(costs):
    raise ConfigError(f'found {len(costs)} units to cut, expected 1 to as many chunks: {chunks}')
  sums = [0.0]
  for cost in costs:
    sums.append(sums[-1] + cost)
  dearest, _ = _best(sums, chunks, max, lambda total: total)
  # Sums in another order differ in the last bits.
  limit = dearest * (1 + 1e-12)
  _, ends = _best(
    sums,
    chunks,
    lambda one, other: one + other,
    lambda total: total**2 if total <= limit else float('inf'),
  )
  starts = [0, *ends[:-1]]
  return Cut(
    sizes=tuple(end - start for start, end in zip(starts, ends, strict=True)),
    totals=tuple(sums[end] - sums[start] for start, end in zip(starts, ends, strict=True)),
    bound=max(sums[-1] / chunks, max(costs)),
  )


def _best(sums, chunks, join, price) -> tuple[float, list[int]]:
  """Returns the least value of all cuts, and where their chunks end.

  Args:
    sums: cost of the first n units, for every n.
    chunks: how many.
    join: value of a chunk and of those before it → value of all.
    price: cost of a chunk → its value.
  """
  units = len(sums) - 1
  value = {0: 0.0}
  steps: list[dict[int, int]] = []
  for chunk in range(1, chunks + 1):
    found: dict[int, float] = {}
    step: dict[int, int] = {}
    # Every chunk before and after has a unit of its own.
    for end in range(chunk, units - (chunks - chunk) + 1):
      options = [
        (join(before, price(sums[end] - sums[start])), start)
        for start, before in value.items()
        if start < end
      ]
      found[end], step[end] = min(options)
    value = found
    steps.append(step)
  ends = [units]
  for step in reversed(steps[1:]):
    ends.append(step[ends[-1]])
  return value[units], ends[::-1]


def cut_folded(costs: Sequence[float], chunks: int) -> Cut:
  """Cuts units in order into chunks where a device has one from the front and one from the back.

  Chunks c and chunks − 1 − c lie on one device, as in a V and in DualPipe: the dearest pair is as
  cheap as possible, found exactly; of the cuts that reach it, one whose chunks have the smallest
  sum of squares. Dynamic programming from both ends towards the middle.

  Args:
    costs: of each unit, 0 or more.
    chunks: how many, an even number; each gets at least one unit.

  Raises:
    ConfigError: there are fewer units than chunks, or an odd number of chunks.
  """
  even = cut_evenly(costs, chunks)
  if chunks % 2:
    raise ConfigError(f'found {chunks} chunks to fold, expected an even number')
  sums = [0.0]
  for cost in costs:
    sums.append(sums[-1] + cost)
  # A cut that is there already says what a pair need not exceed.
  limit = max(a + b for a, b in zip(even.totals, even.totals[::-1], strict=True)) * (1 + 1e-12)
  dearest, _ = _fold(sums, chunks, limit, max, lambda a, b: a + b)
  limit = dearest * (1 + 1e-12)
  _, pairs = _fold(sums, chunks, limit, lambda one, other: one + other, lambda a, b: a * a + b * b)
  sizes = tuple([a for a, _ in pairs] + [b for _, b in reversed(pairs)])
  ends = list(itertools.accumulate(sizes, initial=0))
  return Cut(
    sizes=sizes,
    totals=tuple(sums[end] - sums[start] for start, end in itertools.pairwise(ends)),
    bound=even.bound,
  )


def _fold(sums, chunks, limit, join, price) -> tuple[float, list[tuple[int, int]]]:
  """Returns the least value of all folded cuts, and the units of each pair's two chunks.

  Args:
    sums: cost of the first n units, for every n.
    chunks: how many.
    limit: most that a pair may cost.
    join: value of a pair and of those outside it → value of all.
    price: costs of the two chunks of a pair → its value.
  """
  units, pairs = len(sums) - 1, chunks // 2
  # Units taken from the front and from the back → value, and how it came about.
  value: dict[tuple[int, int], float] = {(0, 0): 0.0}
  steps: list[dict[tuple[int, int], tuple[int, int]]] = []
  for pair in range(pairs):
    found: dict[tuple[int, int], float] = {}
    step: dict[tuple[int, int], tuple[int, int]] = {}
    inner = 2 * (pairs - pair - 1)
    for (front, back), before in value.items():
      room = units - front - back - inner
      for a in range(1, room):
        one = sums[front + a] - sums[front]
        if one > limit:
          break
        # The last pair takes all that is left.
        for b in range(1, room - a + 1) if inner else (room - a,):
          other = sums[units - back] - sums[units - back - b]
          if one + other > limit:
            break
          key, now = (front + a, back + b), join(before, price(one, other))
          if now < found.get(key, float('inf')):
            found[key], step[key] = now, (a, b)
    value = found
    steps.append(step)
  (state, best), sizes = min(value.items(), key=lambda item: item[1]), []
  for step in reversed(steps):
    a, b = step[state]
    sizes.append((a, b))
    state = (state[0] - a, state[1] - b)
  return best, sizes[::-1]


def cut_for_devices(costs: Sequence[float], devices: Sequence[int]) -> Cut:
  """Cuts units in order into chunks so that the dearest device is cheap; a search, not exact.

  Begins with the even cut and gives, as long as it helps, one unit from a chunk to another, those
  between sliding along. It helps if the dearest device gets cheaper, or else the sum of the
  devices' squares, or else that of the chunks.

  Args:
    costs: of each unit, 0 or more.
    devices: of each chunk.

  Raises:
    ConfigError: there are fewer units than chunks.
  """
  even = cut_evenly(costs, len(devices))
  sums = [0.0, *itertools.accumulate(costs)]
  sizes = list(even.sizes)

  def totals_of(sizes: Sequence[int]) -> list[float]:
    ends = [0, *itertools.accumulate(sizes)]
    return [sums[end] - sums[start] for start, end in itertools.pairwise(ends)]

  def value(sizes: Sequence[int]) -> tuple[float, float, float]:
    totals = totals_of(sizes)
    work = [0.0] * (max(devices) + 1)
    for device, total in zip(devices, totals, strict=True):
      work[device] += total
    figures = (max(work), sum(w * w for w in work), sum(t * t for t in totals))
    # Sums in another order differ in the last bits, and would be followed forever.
    return tuple(float(f'{figure:.10e}') for figure in figures)  # type: ignore[return-value]

  best = value(sizes)
  while True:
    options = []
    for giver, taker in itertools.permutations(range(len(sizes)), 2):
      if sizes[giver] > 1:
        moved = list(sizes)
        moved[giver], moved[taker] = moved[giver] - 1, moved[taker] + 1
        options.append((value(moved), moved))
    if not options or min(options)[0] >= best:
      return Cut(sizes=tuple(sizes), totals=tuple(totals_of(sizes)), bound=even.bound)
    best, sizes = min(options)
