"""Which checkpoint a new run begins with."""

import dataclasses
from typing import Literal

from deepseek_jax.core.config import ConfigError


@dataclasses.dataclass(frozen=True)
class InitFrom:
  """Weights of another run, wherever canonical address and shape agree; the rest is new.

  Optimizer and step begin anew. Depth, kinds of attention and the grouping of layers may differ;
  what is loaded, fresh and unused is printed and written to `init_from.json`.

  Attributes:
    path: a workdir, its folder of checkpoints, or the folder of one step.
    step: which checkpoint; None is the newest that is whole.
    weights: `raw`, those of the last step, or `averaged`, those that `Experiment.ema` keeps.
  """

  path: str
  _: dataclasses.KW_ONLY
  step: int | None = None
  weights: Literal['raw', 'averaged'] = 'raw'

  def __post_init__(self):
    errors = []
    if not self.path:
      errors.append("InitFrom.path: expected a run's folder, found ''")
    if self.step is not None and self.step < 0:
      errors.append(f'InitFrom.step: expected at least 0, found {self.step}')
    if errors:
      raise ConfigError(errors)
