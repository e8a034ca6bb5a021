"""The smallest complete run, with grouped-query attention.

Command: python scripts/train.py --config=configs/tiny_mha.py --workdir=runs/tiny_mha
Hardware, time and result: those of configs/tiny_mla.py, from which only the attention differs.
"""

import dataclasses

from configs import tiny_mla
from deepseek_jax.layers.attention.mha import MHA
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.train.experiment import Experiment


def get_config() -> Experiment:
  """Returns the run."""
  base = tiny_mla.get_config()
  assert isinstance(base.model, DeepSeekV3)
  # Four key heads, so that the mesh of four that heads are spread over divides them.
  attention = MHA(heads=8, kv_heads=4, head_dim=8, norm=RMSNorm())
  return dataclasses.replace(
    base, name='tiny_mha', model=dataclasses.replace(base.model, attention=attention)
  )
