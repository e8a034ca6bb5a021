"""Where to cut a model into chunks, so that the slowest is as fast as can be."""

import dataclasses
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
