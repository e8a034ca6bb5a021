"""The smallest complete run whose residual is hyper-connections of four lanes.

Command: python scripts/train.py --config=configs/tiny_mhc.py --workdir=runs/tiny_mhc
Hardware, time and result: those of configs/tiny_mla.py, from which only the residual differs.
"""

import dataclasses

from configs import tiny_mla
from deepseek_jax.layers.hyper_connections import HyperConnections
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.train.experiment import Experiment


def get_config() -> Experiment:
  """Returns the run."""
  base = tiny_mla.get_config()
  assert isinstance(base.model, DeepSeekV3)
  model = dataclasses.replace(base.model, residual=HyperConnections(lanes=4))
  return dataclasses.replace(base, name='tiny_mhc', model=model)
