"""What a sweep tries: an algebra over `{dotted path: value}`, and the configs that come of it.

  product({'model.depth': [2, 4], 'optimizer.peak_lr': [1e-3, 3e-3]}, seeds(3))
  zipped({'model.width': [64, 128], 'model.depth': [2, 4]})
  chain({}, {'balance': None}, strong={'balance': SignBias(rate=0.1)})
  product(…).where(lambda point: point['model.depth'] < 4)

Values are objects, as in `override`. A sweep is a value: nothing here changes one or runs one.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.difference import Change, difference
from deepseek_jax.core.override import override
from deepseek_jax.core.variant_name import Part, name_points

SEED_PATHS = ('seed', 'data.shuffle_seed')
"""What a seed changes: the weights with all noise, and the order of the data."""


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Some points, in order; made by the functions of this file.

  Attributes:
    points: each a tuple of parts, a part being a label or None, and `{dotted path: value}`.
  """

  points: tuple[tuple[Part, ...], ...]

  def __len__(self) -> int:
    """How many points there are."""
    return len(self.points)

  def __iter__(self) -> Iterator[dict[str, Any]]:
    """Each point as one `{dotted path: value}`."""
    return (_merged(point) for point in self.points)

  def where(self, predicate: Callable[[dict[str, Any]], object]) -> 'Sweep':
    """The points for which a predicate holds.

    Args:
      predicate: is given `{dotted path: value}`, with the paths that the point sets.
    """
    kept = tuple(point for point in self.points if predicate(_merged(point)))
    return Sweep(kept)

  def names(self) -> tuple[str, ...]:
    """A short name of each point from what differs; unique, and fit for a folder."""
    return name_points(self.points)


type Factor = Sweep | Mapping[str, Iterable[Any]]


def product(*factors: Factor) -> Sweep:
  """Every combination; the last factor varies fastest.

  Args:
    *factors: sweeps, and `{dotted path: values}`, each path of which is a factor.

  Raises:
    ConfigError: values that are no list, or a path that two factors set.
  """
  axes: list[Sweep] = []
  for factor in factors:
    if isinstance(factor, Sweep):
      axes.append(factor)
    else:
      axes += [_axis(path, values) for path, values in factor.items()]
  return _joined(itertools.product(*(axis.points for axis in axes)), 'product')


def zipped(*factors: Factor) -> Sweep:
  """First with first, second with second, and so on.

  Args:
    *factors: sweeps, and `{dotted path: values}`, all of one length.

  Raises:
    ConfigError: values that are no list, lengths that differ, or a path that is set twice.
  """
  axes: list[tuple[str, Sweep]] = []
  for number, factor in enumerate(factors):
    if isinstance(factor, Sweep):
      axes.append((f'sweep {number + 1}', factor))
    else:
      axes += [(f'`{path}`', _axis(path, values)) for path, values in factor.items()]
  if len({len(axis) for _, axis in axes}) > 1:
    lengths = ', '.join(f'{name} has {len(axis)}' for name, axis in axes)
    raise ConfigError(f'zipped: expected equally many values; {lengths}')
  return _joined(zip(*(axis.points for _, axis in axes), strict=True), 'zipped')


def chain(*sweeps: Sweep | Mapping[str, Any], **named: Sweep | Mapping[str, Any]) -> Sweep:
  """One after the other.

  Args:
    *sweeps: sweeps, and single points `{dotted path: value}`; `{}` changes nothing.
    **named: more of them; the keyword is the name of the point, or stands before each of several.
  """
  points: list[tuple[Part, ...]] = []
  for label, sweep in [*((None, sweep) for sweep in sweeps), *named.items()]:
    if not isinstance(sweep, Sweep):
      points.append(((label, dict(sweep)),))
    elif label is None:
      points += sweep.points
    elif len(sweep) == 1:
      points.append(((label, _merged(sweep.points[0])),))
    else:
      points += [((label, {}), *point) for point in sweep.points]
  return Sweep(tuple(points))


def seeds(count: int, paths: tuple[str, ...] = SEED_PATHS) -> Sweep:
  """The seeds 0, 1, …: each in all of the paths, so that weights and data order both change.

  Args:
    count: how many.
    paths: fields that are set to the seed.

  Raises:
    ConfigError: fewer than one.
  """
  if count < 1:
    raise ConfigError(f'seeds: expected 1 or more, found {count}')
  return Sweep(tuple(((None, dict.fromkeys(paths, seed)),) for seed in range(count)))


def split_seeds(sweep: Sweep) -> tuple[Sweep, tuple[int, ...] | None]:
  """Takes the seeds out of a sweep.

  Args:
    sweep: points, all of them combined with the same seeds or none with any.

  Returns:
    The points without their seeds, each once; and the seeds, None where there are none.

  Raises:
    ConfigError: a point sets some of `SEED_PATHS` by itself, or has other seeds than the rest.
  """
  errors: list[str] = []
  found: dict[str, tuple[tuple[Part, ...], list[int]]] = {}
  for number, point in enumerate(sweep.points):
    values, rest = _merged(point), tuple(_without_seeds(point))
    chosen = {repr(values[path]) for path in SEED_PATHS if path in values}
    given = [path for path in SEED_PATHS if path in values]
    if given and (len(given) < len(SEED_PATHS) or len(chosen) > 1):
      errors.append(f'{", ".join(f"`{path}`" for path in given)} set by hand; use seeds(n)')
    elif not isinstance(values.get('seed', 0), int):
      errors.append(f'`seed` is {values["seed"]!r}; expected a number')
    else:
      # Points without a seed stay apart even where they are the same, which `resolve` reports.
      own = found.setdefault(repr(rest) if given else f'{number} {rest!r}', (rest, []))[1]
      own += [values['seed']] if given else []
      if len(set(own)) < len(own):
        errors.append(f'seed {own[-1]} occurs twice with the same values')
  if len({tuple(own) for _, own in found.values()}) > 1:
    errors.append('all variants need the same seeds: combine them as product(…, seeds(n))')
  if errors:
    raise ConfigError(dict.fromkeys(errors))
  chosen_seeds = next((own for _, own in found.values()), [])
  return Sweep(tuple(rest for rest, _ in found.values())), tuple(chosen_seeds) or None


@dataclasses.dataclass(frozen=True)
class Variant[C]:
  """One config of a sweep.

  Attributes:
    name: what the others do not have; unique, and fit for a folder.
    point: the `{dotted path: value}` that made it.
    config: the whole config.
    changes: where it differs from the one that the sweep began with.
  """

  name: str
  point: dict[str, Any]
  config: C
  changes: tuple[Change, ...]


def resolve[C](base: C, sweep: Sweep) -> tuple[Variant[C], ...]:
  """Applies every point to a config.

  Args:
    base: a frozen dataclass.
    sweep: one point or more.

  Returns:
    A variant for each point, in order.

  Raises:
    ConfigError: with all that is wrong with all variants, and every pair that is the same config.
  """
  if not len(sweep):
    raise ConfigError('the sweep has no variant')
  variants: list[Variant[C]] = []
  faults: dict[str, list[str]] = {}
  for name, point in zip(sweep.names(), sweep, strict=True):
    try:
      config, changes = override(base, point)
    except ConfigError as error:
      note_faults(faults, name, error.messages)
      continue
    variants.append(Variant(name, point, config, tuple(changes)))
  messages = list_faults(faults, len(sweep))
  for one, other in itertools.combinations(variants, 2):
    if not difference(one.config, other.config):
      messages.append(f'variants {one.name} and {other.name} are the same config')
  if messages:
    raise ConfigError(messages)
  return tuple(variants)


def note_faults(faults: dict[str, list[str]], name: str, messages: Iterable[str]) -> None:
  """Adds what is wrong with a variant to `message → names of variants`."""
  for message in messages:
    faults.setdefault(message, []).append(name)


def list_faults(faults: Mapping[str, list[str]], variants: int) -> list[str]:
  """Returns each fault once, with the variants that have it.

  Args:
    faults: as `note_faults` fills it.
    variants: how many there are in all.
  """
  lines = []
  for message, names in faults.items():
    every = len(names) == variants and variants > 1
    lines.append(f'{f"all {variants} variants" if every else ", ".join(names)}: {message}')
  return lines


def _merged(point: tuple[Part, ...]) -> dict[str, Any]:
  return {path: value for _, values in point for path, value in values.items()}


def _without_seeds(point: tuple[Part, ...]) -> Iterator[Part]:
  for label, values in point:
    rest = {path: value for path, value in values.items() if path not in SEED_PATHS}
    # A part that was nothing but a seed leaves nothing; an unchanged base stays a part.
    if rest or label is not None or not values:
      yield label, rest


def _axis(path: str, values: Any) -> Sweep:
  if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
    raise ConfigError(f'`{path}`: expected a list of values, found {values!r}; write [{values!r}]')
  return Sweep(tuple(((None, {path: value}),) for value in values))


def _joined(combinations: Iterable[Iterable[tuple[Part, ...]]], name: str) -> Sweep:
  points = []
  for combination in combinations:
    parts = tuple(itertools.chain.from_iterable(combination))
    paths = [path for _, values in parts for path in values]
    twice = dict.fromkeys(path for path in paths if paths.count(path) > 1)
    if twice:
      raise ConfigError([f'{name}: `{path}` is set twice in one point' for path in twice])
    points.append(parts)
  return Sweep(tuple(points))
