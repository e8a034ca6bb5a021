"""The smallest complete run, with each token attending to the 8 that it scores highest.

Command: python scripts/train.py --config=configs/tiny_top_k.py --workdir=runs/tiny_top_k
Hardware, time and result: those of configs/tiny_mla.py, from which only the attention differs.
"""

import dataclasses

from configs import tiny_mla
from deepseek_jax.layers.attention.top_k import TopK
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.train.experiment import Experiment


def get_config() -> Experiment:
  """Returns the run."""
  base = tiny_mla.get_config()
  assert isinstance(base.model, DeepSeekV3)
  attention = TopK(
    heads=4, nope_dim=8, rope_dim=4, value_dim=8, latent=16, query_latent=24, top_k=8
  )
  return dataclasses.replace(
    base, name='tiny_top_k', model=dataclasses.replace(base.model, attention=attention)
  )
