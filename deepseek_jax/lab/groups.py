"""Which variant each is compared with, and which variants are sizes of one thing: by their names.

A sweep's `baseline` is the name of a variant, with which all others are compared. Or it is the last
part of the names of several, as `rule` is of `depth_2,rule` and `depth_3,rule`: then variants are
groups, each compared with the one of its own group; and those with an equal last part are a family,
which has a scaling curve of its own.
"""

from collections.abc import Iterable

from deepseek_jax.core.config import ConfigError, did_you_mean


def pair_up(baseline: str, names: Iterable[str]) -> dict[str, str]:
  """Returns variant → the variant that it is compared with; a baseline's is itself.

  Args:
    baseline: as the sweep's file has it.
    names: of the variants.

  Raises:
    ConfigError: there is no such variant, or a group has none.
  """
  names = list(names)
  if baseline in names:
    return dict.fromkeys(names, baseline)
  pairs = {name: ','.join([*name.split(',')[:-1], baseline]) for name in names}
  missing = [pair for pair in dict.fromkeys(pairs.values()) if pair not in names]
  if not missing:
    return pairs
  if len(missing) < len(set(pairs.values())):
    raise ConfigError(
      f'`baseline` is {baseline!r}, the last part of some names, and there is no {text!r}'
      for text in missing
    )
  near = did_you_mean(baseline, [*names, *(name.split(',')[-1] for name in names)])
  raise ConfigError(f'`baseline` is {baseline!r}, which is none of [{", ".join(names)}]{near}')


def families(baseline: str, names: Iterable[str]) -> dict[str, list[str]]:
  """Returns family → its variants, in order; one family called '' where there are no groups.

  Args:
    baseline: as the sweep's file has it.
    names: of the variants.
  """
  names = list(names)
  if baseline in names:
    return {'': names}
  found: dict[str, list[str]] = {}
  for name in names:
    found.setdefault(name.split(',')[-1], []).append(name)
  return found
