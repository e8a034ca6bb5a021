"""The smallest complete run, with attention inside segments and a recurrent memory.

Command: python scripts/train.py --config=configs/tiny_recurrent.py --workdir=runs/tiny_recurrent
Hardware, time and result: those of configs/tiny_mla.py, from which only the attention differs.
"""

import dataclasses

from configs import tiny_mla
from deepseek_jax.layers.attention.recurrent import Recurrent, Slots
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.train.experiment import Experiment


def get_config() -> Experiment:
  """Returns the run."""
  base = tiny_mla.get_config()
  assert isinstance(base.model, DeepSeekV3)
  # Four segments in a row of 64.
  attention = Recurrent(
    heads=4,
    nope_dim=8,
    rope_dim=4,
    value_dim=8,
    latent=16,
    query_latent=24,
    size=16,
    memory=Slots(text=4),
  )
  return dataclasses.replace(
    base, name='tiny_recurrent', model=dataclasses.replace(base.model, attention=attention)
  )
