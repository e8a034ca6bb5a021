"""Numbers of a config that the compiled step is given, rather than made with.

Runs that differ in nothing else share one compiled step: a sweep over learning rates compiles once.
A kind says which of its fields these are by a class attribute `traced`; its `build` must then do
nothing with them but arithmetic. It applies to the kinds at `PARTS` of an experiment.
"""

import copy
from typing import Any

import numpy as np

from deepseek_jax.train.experiment import Experiment

PARTS = ('optimizer', 'objective', 'balance')

type Traced = dict[str, Any]
"""Part → field → number, [] float32; and `seed`, [] uint32."""


def traced_values(experiment: Experiment) -> Traced:
  """Returns the numbers as the config has them."""
  found: Traced = {'seed': np.uint32(experiment.seed)}
  for part in PARTS:
    config = getattr(experiment, part)
    names = getattr(config, 'traced', ())
    if names:
      found[part] = {name: np.float32(getattr(config, name)) for name in names}
  return found


def with_traced(experiment: Experiment, values: Traced) -> Experiment:
  """Returns the experiment with other numbers, tracers among them: nothing is validated.

  Args:
    experiment: a valid one.
    values: as `traced_values` returns them.
  """
  parts = {'seed': values['seed']}
  for part, fields in values.items():
    if part in PARTS:
      parts[part] = _with_fields(getattr(experiment, part), fields)
  return _with_fields(experiment, parts)


def _with_fields(config: Any, fields: dict[str, Any]) -> Any:
  fresh = copy.copy(config)
  for name, value in fields.items():
    object.__setattr__(fresh, name, value)  # as a frozen dataclass makes itself
  return fresh
