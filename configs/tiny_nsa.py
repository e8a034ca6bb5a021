"""The smallest complete run, with native sparse attention.

Command: python scripts/train.py --config=configs/tiny_nsa.py --workdir=runs/tiny_nsa
Hardware, time and result: those of configs/tiny_mla.py, from which only the attention differs.
"""

import dataclasses

from configs import tiny_mla
from deepseek_jax.layers.attention.nsa import NSA
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.train.experiment import Experiment


def get_config() -> Experiment:
  """Returns the run."""
  base = tiny_mla.get_config()
  assert isinstance(base.model, DeepSeekV3)
  # Four key heads, so that the mesh of four that heads are spread over divides them.
  attention = NSA(
    heads=8,
    kv_heads=4,
    head_dim=8,
    value_dim=8,
    span=8,
    stride=4,
    block=8,
    blocks=3,
    local=1,
    window=16,
  )
  return dataclasses.replace(
    base, name='tiny_nsa', model=dataclasses.replace(base.model, attention=attention)
  )
