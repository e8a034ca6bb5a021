"""How sure a comparison of runs can be: means, intervals of paired differences, scaling curves."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

DRAWS = 10_000
CONFIDENCE = 0.95
ENOUGH = 3
"""Pairs below which no interval is narrow enough to be of use."""
MANY = 100
"""Seeds beyond which nobody waits."""


def number(value: float, beside: float | None = None, sign: str = '') -> str:
  """Returns a figure with as many decimals as are worth reading.

  Args:
    value: the figure.
    beside: a larger one that it stands beside, whose decimals it gets.
    sign: '+' to show it.
  """
  decimals = 4 if abs(value if beside is None else beside) < 100 else 0
  return f'{value:{sign},.{decimals}f}'


class Summary(NamedTuple):
  """Some seeds of one variant.

  Attributes:
    mean: over the seeds.
    error: standard error of the mean, NaN for a single seed.
    seeds: how many.
  """

  mean: float
  error: float
  seeds: int

  @property
  def text(self) -> str:
    """Mean ± standard error, `?` where one seed has none."""
    error = '?' if math.isnan(self.error) else number(self.error, self.mean)
    return f'{number(self.mean)} ± {error}'


def summarise(values: Sequence[float]) -> Summary:
  """Returns mean and standard error.

  Args:
    values: finite numbers, one a seed; a diverged run has none and is counted elsewhere.

  Raises:
    ValueError: there is none, or one is not finite.
  """
  array = _finite(values, 'values')
  count = len(array)
  error = float(array.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
  return Summary(float(array.mean()), error, count)


class Difference(NamedTuple):
  """A variant less the baseline, pair by pair of equal seeds.

  Attributes:
    mean: of the differences; NaN where no seed is in both.
    low: lower end of the interval, NaN for fewer than two pairs.
    high: upper end.
    bootstrap: ends of the percentile bootstrap alone.
    pairs: seeds that both have.
    deviation: standard deviation of the differences, NaN for fewer than two pairs.
  """

  mean: float
  low: float
  high: float
  bootstrap: tuple[float, float]
  pairs: int
  deviation: float = math.nan

  @property
  def known(self) -> bool:
    """Whether the sign is told: the interval is there and zero is outside."""
    return self.low > 0 or self.high < 0

  @property
  def text(self) -> str:
    """Mean and interval; `[?]` where one pair has none, empty where there is no pair."""
    if not self.pairs:
      return ''
    if self.pairs < 2:
      return f'{number(self.mean, sign="+")} [?]'
    largest = max(abs(self.low), abs(self.high))
    mean, low, high = (number(x, largest, '+') for x in (self.mean, self.low, self.high))
    return f'{mean} [{low}, {high}]'

  @property
  def verdict(self) -> str:
    """What can be said of the sign."""
    if not self.pairs:
      return 'no seed in common with the baseline'
    if self.pairs < 2:
      return 'one seed: cannot be told'
    if self.known:
      return 'lower' if self.mean < 0 else 'higher'
    few = f', with {self.pairs} seeds' if self.pairs < ENOUGH else ''
    needed = seeds_to_tell(self.mean, self.deviation)
    hint = '' if needed is None else f' (it would take some {needed} seeds)'
    return f'not distinguishable{few}{hint}'


def seeds_to_tell(mean: float, deviation: float, confidence: float = CONFIDENCE) -> int | None:
  """Returns how many pairs would tell a difference from zero, if it is as large as it seems.

  Args:
    mean: of the differences.
    deviation: standard deviation of the differences.
    confidence: of the interval, Student's.

  Returns:
    The number, or None where more than `MANY` would be needed, or nothing differs.
  """
  if not mean or not deviation > 0:
    return None
  counts = np.arange(2, MANY + 1)
  reach = stats.t.ppf((1 + confidence) / 2, counts - 1) * deviation / np.sqrt(counts)
  enough = counts[reach < abs(mean)]
  return int(enough[0]) if enough.size else None


def paired_difference(
  values: Mapping[int, float],
  baseline: Mapping[int, float],
  confidence: float = CONFIDENCE,
  draws: int = DRAWS,
) -> Difference:
  """Compares a variant with the baseline over the seeds that both have.

  A seed fixes the data and, as far as shapes agree, the first weights: what it does to both goes
  away in the pair. The interval reaches from the lower to the upper end of two: the percentile
  bootstrap over pairs, and Student's t, since the bootstrap of three to ten pairs is too narrow (of
  three values it cannot leave their range, which holds the truth in three cases of four).

  Args:
    values: figure of the variant by seed, finite.
    baseline: figure of the baseline by seed, finite.
    confidence: of the interval.
    draws: of the bootstrap; its generator has a fixed seed, so equal runs give equal intervals.

  Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapters 12 and 13.
  """
  shared = sorted(set(values) & set(baseline))
  if not shared:
    return Difference(math.nan, math.nan, math.nan, (math.nan, math.nan), 0)
  differences = _finite([values[s] - baseline[s] for s in shared], 'differences')
  mean, count = float(differences.mean()), len(shared)
  if count < 2:
    return Difference(mean, math.nan, math.nan, (math.nan, math.nan), count)
  tail = (1 - confidence) / 2
  picks = np.random.default_rng(0).integers(0, count, (draws, count))
  ends = np.quantile(differences[picks].mean(axis=1), (tail, 1 - tail))
  deviation = float(differences.std(ddof=1))
  reach = float(stats.t.ppf(1 - tail, count - 1) * deviation / math.sqrt(count))
  low, high = min(ends[0], mean - reach), max(ends[1], mean + reach)
  return Difference(
    mean, float(low), float(high), (float(ends[0]), float(ends[1])), count, deviation
  )


class PowerLaw(NamedTuple):
  """loss = floor + scale · computeᐨᵉˣᵖᵒⁿᵉⁿᵗ.

  Attributes:
    floor: what no compute takes away; 0 where the sizes are too few to tell.
    scale: loss above the floor at a compute of 1.
    exponent: of compute, positive where more compute helps.
  """

  floor: float
  scale: float
  exponent: float

  def __call__(self, compute: npt.ArrayLike) -> np.ndarray:
    """Returns the loss at a compute [n]."""
    return self.floor + self.scale * np.asarray(compute, float) ** -self.exponent


def fit_power_law(compute: npt.ArrayLike, loss: npt.ArrayLike) -> PowerLaw:
  """Fits a power law by least squares of relative errors.

  With fewer than four sizes a floor and an exponent cannot be told apart: the floor is then 0.

  Args:
    compute: [n] positive, for example training FLOPs.
    loss: [n] positive.

  Raises:
    ValueError: fewer than two sizes, or a number that is not positive and finite.

  Source: Kaplan et al., arXiv 2001.08361, section 3; with a floor, Hoffmann et al.,
    arXiv 2203.15556, section 3.3.
  """
  x, y = _finite(compute, 'compute'), _finite(loss, 'loss')
  if (x <= 0).any() or (y <= 0).any():
    raise ValueError('compute and loss must be positive')
  sizes = len(np.unique(x))
  if sizes < 2:
    raise ValueError(f'found {sizes} size(s), expected two or more')
  if sizes < 4:
    slope, offset = np.polyfit(np.log(x), np.log(y), 1)
    return PowerLaw(0.0, math.exp(offset), -float(slope))
  # Computes of 1e15 and more: in units of their middle the least squares is well conditioned.
  unit = math.exp(float(np.log(x).mean()))
  powers = np.linspace(0.01, 2.0, 400)
  # Least squares of floor · a + scale · b = 1 for every exponent at once.
  a, b = 1 / y, (x / unit) ** -powers[:, None] / y
  aa, ab, bb = a @ a, b @ a, np.sum(b * b, axis=1)
  floors = (a.sum() * bb - b.sum(axis=1) * ab) / (aa * bb - ab**2)
  floors = np.maximum(floors, 0)
  scales = np.maximum((b.sum(axis=1) - floors * ab) / bb, 0)
  errors = np.sum((floors[:, None] * a + scales[:, None] * b - 1) ** 2, axis=1)
  best = int(np.argmin(errors))
  exponent = float(powers[best])
  return PowerLaw(float(floors[best]), float(scales[best]) * unit**exponent, exponent)


class Band(NamedTuple):
  """A scaling curve with its uncertainty, each [m]."""

  middle: np.ndarray
  low: np.ndarray
  high: np.ndarray


def scaling_band(
  compute: npt.ArrayLike,
  loss: npt.ArrayLike,
  at: npt.ArrayLike,
  confidence: float = CONFIDENCE,
  draws: int = 1000,
) -> Band:
  """Returns the fitted curve at some computes, with a bootstrap interval.

  The runs of each size are drawn with replacement, size by size, so that every draw has every
  size. Seeds are all that the interval knows of: that the law itself may bend is not in it.

  Args:
    compute: [n] of the runs; runs of one size have equal compute.
    loss: [n] of the runs.
    at: [m] computes, also beyond the largest run.
    confidence: of the interval.
    draws: of the bootstrap.

  Raises:
    ValueError: as `fit_power_law`; or a size has one run only, which has no spread.
  """
  x, y = _finite(compute, 'compute'), _finite(loss, 'loss')
  groups = [np.flatnonzero(x == size) for size in np.unique(x)]
  alone = [f'{x[group[0]]:.4g}' for group in groups if len(group) < 2]
  if alone:
    raise ValueError(f'one run only at compute {", ".join(alone)}: expected two seeds or more')
  generator = np.random.default_rng(0)
  curves = []
  for _ in range(draws):
    drawn = np.concatenate([generator.choice(group, len(group)) for group in groups])
    curves.append(fit_power_law(x[drawn], y[drawn])(at))
  tail = (1 - confidence) / 2
  low, high = np.quantile(curves, (tail, 1 - tail), axis=0)
  return Band(fit_power_law(x, y)(at), low, high)


def _finite(values: npt.ArrayLike, name: str) -> np.ndarray:
  array = np.asarray(values, float)
  if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
    raise ValueError(f'`{name}` must be finite numbers, one or more; found {values!r}')
  return array
